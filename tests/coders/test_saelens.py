"SAELens's format both ways, against dense forwards derived again in float64 and against published values."
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from sae_lab.coders.contract import check_coder, coders, make, randn
from sae_lab.coders.formats import check_subject, detect, read, read_safetensors, write
from sae_lab.coders.saelens import ARCHITECTURES, CFG, REST, WEIGHTS, express, expressible, metadata
from sae_lab.coders.standardised import standardise
from sae_lab.ground.errors import DamagedFile, InputError

D_IN, D_SAE, D_OUT, N = 6, 12, 5, 40
META = {"sae_lens_version": "6.54.12", "model_name": "gpt2-small", "hook_name": "blocks.2.hook_mlp_out",
        "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {"fold_ln": True}}


def stored(architecture, seed=0):
    "Tensors as SAELens stores them, decoder rows far from norm 1."
    d_out = D_OUT if "transcoder" in architecture else D_IN
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, d_out), "b_dec": (d_out,)}
    if "skip" in architecture: shapes["W_skip"] = (d_out, D_IN)
    rest = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    shapes |= {name: (D_SAE,) for name in rest + (("threshold",) if "jumprelu" in architecture else ())}
    tensors = {name: randn(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    if "batchtopk" in architecture: tensors["topk_threshold"] = torch.tensor(0.7, dtype=torch.float64)
    return tensors


def folder(path, architecture, tensors=None, **cfg):
    "A SAELens folder."
    path.mkdir(parents=True, exist_ok=True)
    save_file(stored(architecture) if tensors is None else tensors, path / WEIGHTS)
    base = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": "transcoder" not in architecture, "normalize_activations": "none",
            "reshape_activations": "none", "metadata": META}
    if "topk" in architecture: base["k"] = 3
    if "matryoshka" in architecture: base["matryoshka_widths"] = [4, D_SAE]
    if "transcoder" in architecture: base["d_out"] = D_OUT
    (path / CFG).write_text(json.dumps(base | cfg))
    return path


def forward(architecture, tensors, x, k=3, apply=True, rescale=False):
    "SAELens's forward, dense, in float64: codes and output."
    t = {key: value.double() for key, value in tensors.items()}
    norms = t["W_dec"].norm(dim=1) if rescale else torch.ones(D_SAE).double()
    seen = x - t["b_dec"] if apply and "transcoder" not in architecture else x
    if architecture == "gated":
        pre = seen @ t["W_enc"]
        z = (pre * t["r_mag"].exp() + t["b_mag"]).relu() * (pre + t["b_gate"] > 0)
    else: z = (seen @ t["W_enc"] + t["b_enc"]) * norms
    if architecture == "topk": z = torch.zeros_like(z).scatter(1, z.topk(k).indices, z.topk(k).values.relu())
    if "jumprelu" in architecture: z = z.relu() * (z > t["threshold"].relu())
    if "batchtopk" in architecture: z = z.relu() * (z > t["topk_threshold"])
    z = z.relu()
    y = (z / norms) @ t["W_dec"] + t["b_dec"]
    return z, y + x @ t["W_skip"].T if "W_skip" in t else y


def agree(coder, z, y, x, tol=1e-5):
    "Codes and outputs of a coder as given, to float tolerance."
    codes, out = coder(x.float())
    torch.testing.assert_close(codes.dense().double(), z, rtol=tol, atol=tol)
    torch.testing.assert_close(out.double(), y, rtol=tol, atol=tol)
    assert codes.counts().float().mean() > 0.5


X = randn(N, D_IN, seed=99).double()


READABLE = [(name, apply) for name in ARCHITECTURES  # SAELens has no transcoder that subtracts b_dec
            for apply in ((False,) if "transcoder" in name else (True, False))]


@pytest.mark.parametrize("architecture, apply", READABLE)
def test_read(architecture, apply, tmp_path):
    "Every architecture gives SAELens's codes and outputs, with b_dec subtracted as the file says."
    trained = "batchtopk" in architecture
    path = folder(tmp_path / "sae", architecture, apply_b_dec_to_input=apply)
    assert detect(path) == "saelens"
    coder = read(path)
    z, y = forward(architecture, stored(architecture), X, apply=apply, rescale=trained)
    agree(coder, z, y, X)
    assert coder.spec.kind == ARCHITECTURES[architecture].kind and coder.spec.hooks_in == ("blocks.2.hook_mlp_out",)
    assert coder.spec.subject == {"name": "gpt2-small", "processing": {
        "fold_ln": True, "center_writing_weights": False, "fold_value_biases": False}}
    assert check_coder(coder)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [True, False])
def test_decoder_norms_enter_the_codes_once(architecture, rescale, tmp_path):
    "rescale_acts_by_decoder_norm: codes are multiplied by the norms, a scalar threshold is not."
    path = folder(tmp_path / "sae", architecture, rescale_acts_by_decoder_norm=rescale)
    agree(read(path), *forward(architecture, stored(architecture), X, rescale=rescale), X)


def test_published_values(data, tmp_path):
    "Forward values that SAELens's own tests state."
    said = json.loads((data / "interop" / "saelens_forward_values.json").read_text())
    for name, architecture in (("saelens_gated_forward", "gated"), ("saelens_jumprelu_forward", "jumprelu")):
        case, rest = said[name], ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("threshold",)
        tensors = {"W_enc": torch.ones(2, 3), "W_dec": torch.ones(3, 2), "b_dec": torch.zeros(2)}
        tensors |= {key: torch.tensor(case[key]) for key in rest}
        if architecture == "jumprelu": tensors["b_enc"] = torch.zeros(3)
        coder = read(folder(tmp_path / name, architecture, tensors, d_in=2, d_sae=3))
        codes, y = coder(torch.tensor(case["x"]))
        torch.testing.assert_close(codes.dense(), torch.tensor(case["acts_post"]), rtol=0, atol=1e-3)
        torch.testing.assert_close(y, torch.tensor(case["recons"]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "batchtopk"])
def test_expected_average_is_folded_once(architecture, apply, tmp_path):
    "Trained on s x: given by the caller, or by the scaler of a checkpoint; refused where nobody says it."
    path = folder(tmp_path / "sae", architecture, normalize_activations="expected_average_only_in",
                  apply_b_dec_to_input=apply)
    with pytest.raises(InputError, match="does not say by how much"): read(path)
    z, y = forward(architecture, stored(architecture), 2.5 * X, apply=apply, rescale=architecture == "batchtopk")
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="a number above 0"): read(path, scaling_factor=wrong)
    given = read(path, scaling_factor=2.5)
    agree(given, z, y / 2.5, X)
    assert given.spec.scale_in == given.spec.scale_out == 2.5
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.5, "has_whitening": False}))
    agree(read(path), z, y / 2.5, X)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": -1}))
    with pytest.raises(DamagedFile, match="above 0"): read(path)


@pytest.mark.parametrize("apply", [True, False])
def test_whitening_is_folded(apply, tmp_path):
    "Trained on (s x - mean) M: mean and matrix go into the weights."
    matrix = torch.eye(D_IN).double() + 0.2 * randn(D_IN, D_IN, seed=5).double()
    mean, inverse = randn(D_IN, seed=6).double(), torch.linalg.inv(matrix)
    path = folder(tmp_path / "sae", "standard", normalize_activations="covariance_whitening",
                  apply_b_dec_to_input=apply)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.0, "has_whitening": True}))
    with pytest.raises(DamagedFile, match="missing"): read(path)
    save_file({"mean": mean, "matrix": matrix, "inverse_matrix": inverse.contiguous()},
              path / "activation_whitening.safetensors")
    z, y = forward("standard", stored("standard"), (2 * X - mean) @ matrix, apply=apply)
    agree(read(path), z, (y @ inverse + mean) / 2, X)
    save_file({"mean": mean, "matrix": matrix, "inverse_matrix": 2 * matrix}, path / "activation_whitening.safetensors")
    with pytest.raises(DamagedFile, match="two inverse ones"): read(path)


@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_norms_a_row(architecture, how, tmp_path):
    "Each row is standardised on the way in and brought back on the way out; it goes out again as it came."
    path = folder(tmp_path / "sae", architecture, normalize_activations=how)
    mean, scale = X.mean(1, keepdim=True), X.std(1, keepdim=True)
    if how == "constant_norm_rescale": mean, scale = 0 * mean, X.norm(dim=1, keepdim=True) / math.sqrt(D_IN)
    seen = (X - mean) / (scale + (1e-5 if how == "layer_norm" else 0))
    z, y = forward(architecture, stored(architecture), seen)
    coder = read(path)
    agree(coder, z, y * scale + mean, X)
    out = write(coder, tmp_path / "again", "saelens")
    assert json.loads((out / CFG).read_text())["normalize_activations"] == how
    assert read(out).identity == coder.identity


def awkward(kind, **args):
    "A coder whose every number is its own, folded from training units."
    coder = make(kind, d_in=D_IN if kind not in ("neurons", "pca") else 12, d_sae=D_SAE, **args)
    state = coder.state_dict()
    numbers = [(key, value) for key, value in sorted(state.items()) if value.is_floating_point()]
    for i, (key, value) in enumerate(numbers):
        state[key] = value + 0.05 * randn(*value.shape, seed=i).abs() if value.ndim else value + 0.3
    coder.load_state_dict(state)
    hook = ("blocks.0.hook_resid_post",)
    coder.spec = coder.spec.with_(hooks_in=hook, hooks_out=hook, subject={"name": "m", "processing": {"fold_ln": True}},
                                  provenance={"seed": 3, "tokens": 10**6}, scale_in=1.5, scale_out=1.5)
    return coder


KINDS = [(kind, {}) for kind in coders if kind not in ("topk", "transcoder", "skip_transcoder")]
KINDS += [(kind, {"gate": gate}) for kind in ("transcoder", "skip_transcoder")
          for gate in ("relu", "batchtopk", "topk")]


def small(kind, args):
    "Arguments for a small coder of the kind."
    signature = coders[kind].value.__wrapped__.__kwdefaults__ or {}
    given = {"k": 3, "inner_args": {"k": 3}}
    return args | {key: value for key, value in given.items() if key in signature}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, args", [*KINDS, ("topk", {"k": 3})])
def test_every_kind_comes_back_or_says_why_not(kind, args, dtype, tmp_path):
    "What SAELens can express comes back to the bit; the rest is refused with the reason."
    try: coder = awkward(kind, **small(kind, args)).to(dtype)
    except InputError: coder = make(kind, d_in=D_IN, d_sae=64, **args).to(dtype)
    try: path = write(coder, tmp_path / "sae", "saelens")
    except InputError as error:
        assert f"cannot express a {kind}: {error.why}" in str(error) and len(error.why) > 20
        assert not (tmp_path / "sae").exists()
        return
    again = read(path)
    assert again.identity == coder.identity and again.spec == coder.spec and again.W_dec.dtype == dtype
    if dtype is torch.float32: assert check_coder(again)
    cfg = json.loads((path / CFG).read_text())
    assert cfg["metadata"]["sae_lens_version"] >= "6" and cfg["metadata"]["hook_name"] == coder.spec.hooks_in[0]
    assert cfg["metadata"]["model_from_pretrained_kwargs"] == {"fold_ln": True}
    assert cfg["architecture"] not in ("batchtopk", "matryoshka_batchtopk")
    if dtype is torch.float32 and cfg["architecture"] in ARCHITECTURES and cfg["normalize_activations"] == "none":
        bare = {key: value for key, value in cfg.items() if key != "sae_lab"}
        (path / CFG).write_text(json.dumps(bare))
        x, as_saelens = randn(N, coder.d_in, seed=4), read(path)
        (mine, y), (theirs, y_) = again(x), as_saelens(x)
        torch.testing.assert_close(mine.dense(), theirs.dense(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, y_, rtol=1e-5, atol=1e-5)


def test_the_table_covers_every_kind():
    "A row a kind, each with an architecture or a reason."
    rows = expressible()
    assert {row["kind"].split()[0] for row in rows} == set(coders)
    known = {*ARCHITECTURES, "abstopk", "matching_pursuit"}
    assert all((row["SAELens"] in known) != bool(row["why not"]) for row in rows)
    found = {row["kind"]: row["SAELens"] for row in rows}
    assert found["batchtopk"] == found["matryoshka"] == found["jumprelu"] == "jumprelu" and found["gated"] == "gated"
    assert found["relu_april"] == "standard" and found["transcoder gate=relu"] == "transcoder"
    assert found["crosscoder"] == found["nmf"] == found["binary"] == "–"


def test_several_hooks_and_other_gains_are_refused():
    "SAELens has one hook a side; a norm with another epsilon is another coder."
    coder = make("topk", d_in=8, d_sae=16, k=2)
    coder.spec = coder.spec.with_(hooks_in=("a", "b"), hooks_out=("a", "b"))
    with pytest.raises(InputError, match="one hook a side"): express(coder)
    norm = standardise(make("topk", d_in=8, d_sae=16, k=2))
    with pytest.raises(InputError, match="adds 1e-05 to the scale"): express(norm.scaled(0.1, 0.1))
    with pytest.raises(InputError, match="no dtype"):
        write(make("random", d_in=4, d_sae=8, k=2).to(torch.float8_e5m2), "x", "saelens")


@pytest.mark.parametrize("change", ["weights", "k", "both"])
def test_altered_files_win_and_say_so(change, tmp_path):
    "Weights or settings changed by another program are read as they are, with a warning."
    path = write(make("topk", d_in=D_IN, d_sae=D_SAE, k=3), tmp_path / "sae", "saelens")
    cfg, tensors = json.loads((path / CFG).read_text()), read_safetensors(path / WEIGHTS)
    if change != "k": save_file({key: 2 * value for key, value in tensors.items()}, path / WEIGHTS)
    if change != "weights": (path / CFG).write_text(json.dumps(cfg | {"k": 5}))
    with pytest.warns(UserWarning, match="changed after sae_lab wrote them"): coder = read(path)
    agree(coder, *forward("topk", read_safetensors(path / WEIGHTS), X, k=cfg["k"] if change == "weights" else 5), X)
    cfg["metadata"]["l0"], cfg["device"] = 3.0, "cuda"  # what does not change the coder changes nothing
    save_file(tensors, path / WEIGHTS)
    (path / CFG).write_text(json.dumps(cfg))
    assert read(path).spec.kind == "topk"


def test_our_own_part_is_not_trusted(tmp_path):
    "A spec that does not fit, or state that was altered, is refused."
    coder = awkward("jumprelu")
    path = write(coder, tmp_path / "sae", "saelens")
    cfg = json.loads((path / CFG).read_text())
    assert (path / REST).is_file()  # levels and unit are not in SAELens's weights
    for change in ({"spec": {"kind": "jumprelu"}}, {"spec": cfg["sae_lab"]["spec"] | {"kind": "nonsense"}},
                   {"spec": cfg["sae_lab"]["spec"] | {"args": {"d_in": 3}}}, {"identity": "0" * 16}):
        (path / CFG).write_text(json.dumps(cfg | {"sae_lab": cfg["sae_lab"] | change}))
        with pytest.raises(DamagedFile): read(path)
    (path / CFG).write_text(json.dumps(cfg))
    rest = read_safetensors(path / REST)
    save_file({key: value + 1 for key, value in rest.items()}, path / REST)
    with pytest.raises(DamagedFile, match="altered"): read(path)


LEGACY = {"hook_point": "blocks.1.attn.hook_z", "hook_point_head_index": None, "d_in": D_IN, "d_sae": D_SAE,
          "model_name": "gpt2-small", "dtype": "torch.float32", "activation_fn_str": "relu", "expansion_factor": 2}


@pytest.mark.parametrize("change, architecture", [
    ({}, "standard"), ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}, "topk"),
    ({"architecture": "gated"}, "gated"), ({"architecture": "jumprelu", "sae_lens_version": "5.9.1"}, "jumprelu"),
    ({"normalize_activations": False, "apply_b_dec_to_input": False}, "standard")])
def test_legacy_settings(change, architecture, tmp_path):
    "Flat settings of older versions, under their old names."
    path = folder(tmp_path / "sae", architecture)
    (path / CFG).write_text(json.dumps(LEGACY | change))
    coder = read(path)
    agree(coder, *forward(architecture, stored(architecture), X, apply=change.get("apply_b_dec_to_input", True)), X)
    assert coder.spec.hooks_in == ("blocks.1.attn.hook_z",) and coder.spec.subject["name"] == "gpt2-small"
    check_subject(coder.spec, {"processing": {"fold_ln": True}})  # nobody knows what it was trained on


def test_a_legacy_file_goes_out_as_a_new_one(tmp_path):
    "What was read from an old version is written as version 6, its facts kept, and read by version 6's rules."
    path = folder(tmp_path / "sae", "topk")
    more = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "sae_lens_version": "5.9.1",
            "context_size": 128, "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    (path / CFG).write_text(json.dumps(LEGACY | more))
    out = write(read(path), tmp_path / "new", "saelens")
    cfg = json.loads((out / CFG).read_text())
    said = cfg["metadata"]
    assert said["sae_lens_version"] == "6.54.12" and said["context_size"] == 128 and "activation_fn" not in said
    assert said["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    (out / CFG).write_text(json.dumps({key: value for key, value in cfg.items() if key != "sae_lab"}))
    agree(read(out), *forward("topk", stored("topk"), X), X)
    assert read(out).spec.hooks_in == ("blocks.1.attn.hook_z",) and cfg["reshape_activations"] == "hook_z"


def test_a_run_says_where_its_data_are_from():
    "Context length and corpus of a run reach SAELens's metadata; so do all flags of the subject."
    coder = make("topk", d_in=4, d_sae=8, k=2)
    coder.spec = coder.spec.with_(
        provenance={"source": {"tokens": {"ctx": 64, "source": "fables"}}},
        subject={"name": "m", "processing": {"fold_ln": True, "center_unembed": True, "fold_value_biases": False}})
    said = metadata(coder.spec)
    assert said["context_size"] == 64 and said["dataset_path"] == "fables"
    assert said["model_from_pretrained_kwargs"] == {"fold_ln": True, "center_unembed": True}


def test_legacy_tensors(tmp_path):
    "A scale of fine-tuning multiplies decoder rows; one of ones is nothing; log thresholds are exponentiated."
    path, base = folder(tmp_path / "sae", "standard"), stored("standard")
    factor = torch.linspace(0.5, 2, D_SAE)
    (path / CFG).write_text(json.dumps(LEGACY))
    save_file(base | {"scaling_factor": torch.ones(D_SAE)}, path / WEIGHTS)
    agree(read(path), *forward("standard", base, X), X)
    save_file(base | {"scaling_factor": factor}, path / WEIGHTS)
    with pytest.raises(DamagedFile, match="finetuning_scaling_factor is off"): read(path)
    (path / CFG).write_text(json.dumps(LEGACY | {"finetuning_scaling_factor": True}))
    z = forward("standard", base, X)[0]
    agree(read(path), z, (z * factor) @ base["W_dec"].double() + base["b_dec"], X)
    jump = stored("jumprelu")
    given = {key: value for key, value in jump.items() if key != "threshold"} | {"log_threshold": jump["threshold"]}
    path = folder(tmp_path / "jump", "jumprelu", given)
    agree(read(path), *forward("jumprelu", jump | {"threshold": jump["threshold"].double().exp()}, X), X)


def test_legacy_and_unknown_are_refused(tmp_path):
    "What we cannot say in our words is refused with what it is."
    path = folder(tmp_path / "sae", "standard")
    for cfg, what in (({"architecture": 7, "metadata": META}, "'architecture' is 7"),
                      (LEGACY | {"activation_fn_str": "tanh-relu"}, "tanh-relu"),
                      (LEGACY | {"activation_fn_str": "topk"}, "'k' missing"),
                      (LEGACY | {"normalize_activations": True}, "does not say by how much"),
                      (LEGACY | {"architecture": "temporal"}, "'temporal', which has no kind"), ([], "no settings")):
        (path / CFG).write_text(json.dumps(cfg))
        with pytest.raises((DamagedFile, InputError), match=what): read(path)
    path = folder(tmp_path / "t", "transcoder", normalize_activations="layer_norm")
    with pytest.raises(DamagedFile, match="a transcoder with normalize_activations"): read(path)


@pytest.mark.parametrize("change, cfg, what", [
    ({"W_enc": None}, {}, "W_enc missing"), ({"b_enc": torch.ones(D_SAE + 1)}, {}, "b_enc is"),
    ({"W_dec": torch.ones(D_SAE, D_IN) * float("nan")}, {}, "W_dec holds NaN"),
    ({"extra": torch.ones(2)}, {}, "extra in a"), ({}, {"normalize_activations": "magic"}, "'magic'"),
    ({}, {"d_sae": 99}, "d_sae 99, while its weights have 12"),
    ({"W_enc": torch.ones(D_SAE, D_IN)}, {}, "d_in 6, while its weights have 12"),
    ({"W_enc": torch.ones(D_SAE, D_IN)}, {"d_in": None, "d_sae": None}, "the same latents")])
def test_damaged_folders(change, cfg, what, tmp_path):
    "A missing key, a wrong shape, NaN, settings that do not fit: refused by name."
    tensors = {key: value for key, value in (stored("standard") | change).items() if value is not None}
    path = folder(tmp_path / "sae", "standard", tensors, **cfg)
    with pytest.raises(DamagedFile, match=what): read(path)


def test_hostile_folders(tmp_path):
    "A pickle under the weights' name, a file cut short, a header of 100 GB, no settings."
    path = folder(tmp_path / "sae", "standard")
    whole = (path / WEIGHTS).read_bytes()
    head = json.dumps({"W_enc": {"dtype": "F32", "shape": [250_000, 100_000], "data_offsets": [0, 10**11]}}).encode()
    torch.save({"W_enc": torch.ones(2)}, tmp_path / "x.pt")
    for content in (whole[:-7], whole[:20], len(head).to_bytes(8, "little") + head, (tmp_path / "x.pt").read_bytes()):
        (path / WEIGHTS).write_bytes(content)
        with pytest.raises(DamagedFile, match=WEIGHTS): read(path)
    (path / WEIGHTS).write_bytes(whole)
    (path / CFG).write_text("{")
    with pytest.raises(DamagedFile, match=CFG): read(path)


def test_hook_z_is_said_both_ways(tmp_path):
    "Heads side by side are SAELens's reshape_activations."
    coder = make("topk", d_in=8, d_sae=16, k=2)
    coder.spec = coder.spec.with_(hooks_in=("blocks.1.attn.hook_z",), hooks_out=("blocks.1.attn.hook_z",))
    cfg = json.loads((write(coder, tmp_path / "sae", "saelens") / CFG).read_text())
    assert cfg["reshape_activations"] == "hook_z"
