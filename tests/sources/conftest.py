"A small random model with a tokenizer, on fables."
import pytest


@pytest.fixture(scope="session")
def stories():
    "Labelled documents."
    from sae_lab.sources.fables import fables

    return list(fables(0, 80))


@pytest.fixture(scope="session")
def folder(tmp_path_factory, stories):
    "A Hugging Face folder: GPT-2, 3 layers, width 48, random weights large enough to matter."
    import torch
    from transformers import AutoModelForCausalLM

    from sae_lab.sources.bridge import untrained

    path = untrained(tmp_path_factory.mktemp("gpt2"), [s.text for s in stories], vocabulary=600, n_layer=3, n_embd=48)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, weight in model.named_parameters():
            size = 0.1 if "ln" in name or "bias" in name else 0.05
            weight.add_(torch.randn(weight.shape, generator=generator) * size)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def subject(folder):
    "The same as a subject."
    from sae_lab.sources.subject import Subject

    return Subject.load(folder)


@pytest.fixture(scope="session")
def tokens(subject, stories):
    "A few thousand packed tokens."
    from sae_lab.sources.corpus import Corpus

    return Corpus(lambda: stories, "fables").tokens(subject, 4000)
