// A view as it is, with no more to it.
export default { render({ model, el }) { el.classList.add("sl"); follow(model, el); } };
