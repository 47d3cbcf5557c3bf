"""Hand-written: the one file that imports transformers and transformer_lens, always inside functions.

Everything above sees a subject; only what is said here knows how a model is fetched and bridged.
"""
import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.errors import InputError, Unavailable
from ..ground.files import hash_tensors

__all__ = ["DTYPES", "TOKENIZER_FILES", "Reached", "Plain", "unharmed", "pretrained", "native", "untrained"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def _bridge_class() -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise Unavailable(
            f"transformer_lens cannot be used ({error})",
            "transformer-lens 3.9 or 4",
            "pip install 'transformer-lens>=3.9,<5'",
        ) from error
    return TransformerBridge


@contextmanager
def _no_bars() -> Iterator[None]:
    "No progress bar for the milliseconds that reading weights takes; the user's setting comes back."
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _checked_folder(name: str) -> bool:
    "Whether `name` is a local folder; raises InputError when it is one without model or tokenizer."
    folder = Path(name)
    if not folder.is_dir():
        return False
    if not (folder / "config.json").exists():
        raise InputError(
            f"folder {name} has no config.json",
            "a Hugging Face model folder",
            "save the model with save_pretrained",
            path=name,
        )
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise InputError(
            f"folder {name} has no tokenizer",
            f"one of {', '.join(TOKENIZER_FILES)}",
            "save the tokenizer there too, or wrap a model of your own with Subject.wrap(model)",
            path=name,
        )
    return True


@contextmanager
def unharmed(
    modules: Sequence[nn.Module],  # whose hooks the block sets
    model: Any = None,  # a bridge that the block runs
) -> Iterator[None]:
    "Put everything back when the block fails, also where an interrupt falls between setting a hook and noting it."
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    held = [(hooks, type(hooks)(hooks)) for each in modules for hooks in [getattr(each, name) for name in names]]
    lists = [(handles, list(handles)) for each in modules for handles in [getattr(each, "fwd_hooks", [])]]
    level, grad = getattr(model, "context_level", 0), torch.is_grad_enabled()
    try:
        yield
    except BaseException:
        torch.set_grad_enabled(grad)
        if model is not None:
            model.context_level = level
        for hooks, before in held:
            hooks.clear()
            hooks.update(before)
        for handles, before in lists:
            handles[:] = before
        raise


class Reached(Exception):
    "Raised inside a model when the last wanted place has fired: nothing behind it is computed."


@dataclass(frozen=True, eq=False)
class Plain:
    """The model as Hugging Face runs it, beside its bridge and on the same weights.

    A bridge computes attention and norms step by step, so that each step can be hooked. Activations at a place that is the
    input or output of one of the model's own modules can be had without that: fused attention, no step for show.
    """

    model: nn.Module  # the Hugging Face model
    places: dict[str, tuple[nn.Module, str]]  # bridge's name of a place -> module and "in" or "out"

    def run(
        self,
        tokens: Tensor,  # token ids [batch, pos]
        places: Iterable[str],  # names, all among `places`
        stop: bool = True,  # stop behind the last
    ) -> dict[str, Tensor]:  # activations by name
        "Activations at some places."
        wanted, store, handles = set(places), dict[str, Tensor](), []

        def keep(name: str, act: Any) -> None:
            store[name] = act[0] if isinstance(act, tuple) else act
            if stop and len(store) == len(wanted):
                raise Reached

        with unharmed([self.places[name][0] for name in wanted]):
            try:
                for name in wanted:
                    module, side = self.places[name]
                    if side == "in":
                        read = lambda _, args, kw, name=name: keep(name, args or kw.get("hidden_states"))
                        handles.append(module.register_forward_pre_hook(read, with_kwargs=True))
                    else:
                        handles.append(module.register_forward_hook(lambda _, args, out, name=name: keep(name, out)))
                self.model(tokens, use_cache=False)
            except Reached:
                pass
            finally:
                for handle in handles:
                    handle.remove()
        return store


@torch.no_grad()
def _plain(hf: nn.Module, paths: dict[int, str], model: Any) -> Plain:
    "The places where the Hugging Face model gives what the bridge gives; every one is tried out."
    places = {}
    for point in model.hook_dict.values():
        owner, _, side = str(point.name).rpartition(".hook_")
        try:
            path = paths.get(id(model.get_submodule(owner).original_component))
        except AttributeError:
            continue
        if path is not None and side in ("in", "out"):
            places[point.name] = (hf.get_submodule(path), side)
    probe = torch.arange(10, device=next(hf.parameters()).device).reshape(2, 5) % model.cfg.d_vocab
    truth = dict(model.run_with_cache(probe, return_type=None)[1].items())
    found = Plain(hf, places).run(probe, places, stop=False)
    return Plain(hf, {name: place for name, place in places.items() if _same(found.get(name), truth.get(name))})


def _same(found: object, truth: object) -> bool:
    if not isinstance(found, Tensor) or not isinstance(truth, Tensor) or not found.is_floating_point():
        return False
    if found.ndim != 3 or truth.shape[:2] != found.shape[:2] or truth.numel() != found.numel():
        return False
    near = 1e-4 if found.dtype == torch.float32 else 3e-2
    return bool((found - truth.flatten(2)).float().norm() <= near * truth.float().norm())


def pretrained(
    name: str,  # a Hugging Face name, or a local folder with model and tokenizer
    device: str,  # where the model is to live, "cpu" or "cuda"
    dtype: str,  # float32, float16 or bfloat16
    processing: dict[str, bool],  # weight processing by TransformerLens; all False keeps the weights
) -> tuple[Any, Any, str, Plain | None]:  # bridged model, tokenizer, hash of the published weights, plain model
    "Fetch and bridge a causal language model."
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}", f"one of {', '.join(DTYPES)}", "choose one of them")
    bridge = _bridge_class()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = {"local_files_only": True} if _checked_folder(name) else {}
    with _no_bars():
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **local)
            hf: Any = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype], **local)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{name!r} could not be loaded ({str(error).splitlines()[0]})",
                "a local folder, or a Hugging Face name that is cached or can be fetched",
                "check the spelling, the network or HF_HUB_OFFLINE",
                name=name,
            ) from error
    weights = hash_tensors(dict(hf.state_dict()))
    hf = hf.to(device).eval()
    hf.config.use_cache = False  # no generation here: keys and values need not be kept
    twin = copy.deepcopy(hf, {id(each): each for each in hf.parameters()})  # other modules, same weights
    paths = {id(module): path for path, module in hf.named_modules()}
    with _no_bars():
        model = bridge.boot_transformers(name, hf_model=hf, tokenizer=tokenizer, device=device).eval()
    if not any(processing.values()):
        return model, tokenizer, weights, _plain(twin, paths, model)
    model.enable_compatibility_mode(disable_warnings=True, **processing)
    return model.eval(), tokenizer, weights, None


def native(
    seed: int = 0,  # of the random weights
    **config: Any,  # d_model, d_head, n_layers, n_ctx, n_heads, d_vocab, act_fn...
) -> Any:  # a bridged model of TransformerLens' own kind, random weights, no tokenizer
    "A small TransformerLens model from its configuration alone, to be filled with weights or tried out."
    bridge = _bridge_class()
    from transformer_lens.config import TransformerBridgeConfig

    return bridge.boot_native(TransformerBridgeConfig(seed=seed, **config)).eval()


def untrained(
    folder: str | Path,  # where to save model and tokenizer
    texts: list[str],  # what the byte-level BPE tokenizer is trained on
    vocabulary: int = 512,  # tokens, one special among them
    seed: int = 0,  # of the random weights
    **config: int,  # n_layer, n_embd, n_head, n_positions of the GPT-2 architecture
) -> Path:  # the folder: the null baseline, and something to try code on
    "Save a GPT-2 with random weights and a tokenizer of its own as a Hugging Face folder."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)
    sizes: dict[str, Any] = dict(n_layer=2, n_embd=32, n_head=4, n_positions=64) | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0, **sizes)
        )
    with _no_bars():
        model.save_pretrained(folder)
    return Path(folder)
