"""What every oracle script shares: seeds, versions, files, and one training loop.

An oracle computes, with PyTorch and Hugging Face transformers on the CPU, what Pith must compute,
and writes it to tests/golden/. It knows nothing of Pith's code. A new model needs a
MODEL_reference.py (a float64 forward written from the paper's formulas), a MODEL_goldens.py and a
MODEL_train.py; everything else is here.
"""

import contextlib
import copy
import dataclasses
import json
import math
import pathlib
import shutil
import struct
import sys
import tempfile

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
MAX_FOLDER_BYTES = MAX_FILE_BYTES = 1_000_000
IGNORE = -100


# ---- versions and repeatability -----------------------------------------------------------------


def start():
    """One thread, deterministic kernels, and the pinned versions or exit 2."""
    pinned = dict(line.split("==") for line in
                  (pathlib.Path(__file__).parent / "requirements.txt").read_text().split("\n")
                  if "==" in line)
    have = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    for name, version in have.items():
        if version != pinned[name]:
            print(f"error: {name}: wrong version (got {version}, need {pinned[name]}). "
                  "Try: pip install -r tests/oracle/requirements.txt", file=sys.stderr)
            sys.exit(2)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()


def generator(seed):
    """NumPy's counter-based generator: the same numbers under every version and thread count."""
    return np.random.Generator(np.random.Philox(seed))


def metadata(script, seed, **more):
    """The provenance that every golden carries (safetensors metadata holds strings only)."""
    facts = {"script": f"tests/oracle/{pathlib.Path(script).name}", "seed": seed,
             "torch": torch.__version__, "transformers": transformers.__version__,
             "numpy": np.__version__, "device": "cpu"}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in (facts | more).items()}


# ---- files --------------------------------------------------------------------------------------

DTYPE_NAMES = {"float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64", "uint8": "U8"}


def save_safetensors(path, tensors, meta):
    """Like safetensors' own writer (wide types first, so that each is aligned; then by name), but
    the same input always gives the same bytes."""
    header, blobs, offset = {"__metadata__": dict(sorted(meta.items()))}, [], 0
    arrays = {n: t.detach().numpy() if isinstance(t, torch.Tensor) else np.asarray(t)
              for n, t in tensors.items()}
    for name, value in sorted(arrays.items(), key=lambda x: (-x[1].itemsize, x[0])):
        blob = np.ascontiguousarray(value).tobytes()
        header[name] = {"dtype": DTYPE_NAMES[str(value.dtype)], "shape": list(value.shape),
                        "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def load_safetensors(path, dtype=None):
    from safetensors.torch import load_file

    tensors = load_file(path)
    return {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in tensors.items()}


def save_tokens(path, tokens, ends, dtype=np.uint16):
    """A token file: two NPY v1.0 arrays back to back, ids [N] and u64 document ends [D]."""
    with open(path, "wb") as file:
        for array in (tokens.astype(dtype), np.asarray(ends, np.uint64)):
            np.lib.format.write_array(file, array, version=(1, 0))


@contextlib.contextmanager
def replaced(folder):
    """A temporary folder whose files take the place of `folder`'s once the block succeeds."""
    with tempfile.TemporaryDirectory() as new:
        yield pathlib.Path(new)
        shutil.rmtree(folder, ignore_errors=True)
        for file in pathlib.Path(new).rglob("*"):
            if file.is_file():
                place = folder / file.relative_to(new)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file.read_bytes())
                assert place.stat().st_size < MAX_FILE_BYTES, f"{place}: too large"


def check_size(folder):
    size = sum(f.stat().st_size for f in pathlib.Path(folder).glob("*") if f.is_file())
    assert size < MAX_FOLDER_BYTES, f"{folder}: {size} bytes, need < {MAX_FOLDER_BYTES}"
    return size


# ---- weights under checkpoint names -------------------------------------------------------------


def checkpoint_form(model, values=None):
    """{checkpoint name: tensor} as save_pretrained writes it, for the weights or for `values`.

    `values` maps parameter names to tensors of the same shape (gradients, for example). Going
    through save_pretrained means that whatever transformers fuses, stacks or transposes in memory
    comes back under the names and shapes of the published checkpoints.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if values is not None:
                parameter.copy_(values[name])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_safetensors(pathlib.Path(folder) / "model.safetensors")


def gradients(model):
    """Zero where a parameter took no part (an expert without tokens)."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters()}


def randomise(model, rng, std, overrides=()):
    """N(0, std) for every matrix, 1 + N(0, 0.2) for every vector (norms).

    `overrides`: (substring of the name, std) pairs; the first that matches wins.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                value = 1 + 0.2 * rng.standard_normal(parameter.shape)
            else:
                scale = next((s for part, s in overrides if part in name), std)
                value = scale * rng.standard_normal(parameter.shape)
            parameter.copy_(torch.from_numpy(value))


# ---- comparisons --------------------------------------------------------------------------------


def relative_error(a, b):
    """||a - b|| / ||b||, in float64; 0 when both are zero."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape, f"{tuple(a.shape)} vs {tuple(b.shape)}"
    norm = b.norm().item()
    return (a - b).norm().item() / norm if norm > 0 else float((a - b).norm() > 0)


def need_close(what, got, want, bar):
    error = relative_error(got, want)
    assert error <= bar, f"{what}: relative error {error:.2e}, need <= {bar:.0e}"
    return error


def need_close_all(what, got, want, bar):
    """Per tensor; returns the worst (error, name)."""
    assert got.keys() == want.keys(), f"{what}: names differ: {sorted(got.keys() ^ want.keys())}"
    return max((need_close(f"{what} {n}", got[n], want[n], bar), n) for n in want)


def routing(probs, top_k):
    """(ids by falling probability, their probabilities, smallest gap to the first one left out)."""
    value, index = torch.topk(probs, min(top_k + 1, probs.shape[-1]), dim=-1)
    gap = (value[..., top_k - 1] - value[..., top_k]).min().item() if value.shape[-1] > top_k else 1
    return index[..., :top_k], value[..., :top_k], gap


# ---- training -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Recipe:
    """One run. balance: none | micro-batch | sequence | global-batch, times `coef`."""

    steps: int
    lr: float
    warmup: int
    decay: int
    final_lr: float = 0.0
    balance: str = "none"
    coef: float = 0.0
    global_batch: int = 8
    micro_batch: int = 2
    sequence: int = 32
    weight_decay: float = 0.1
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0


def learning_rate(recipe, step):
    """Linear warm-up from 0, a plateau, then cosine decay to final_lr; `step` counts from 0."""
    start, z = recipe.steps - recipe.decay, recipe.final_lr / recipe.lr
    if step < recipe.warmup:
        return recipe.lr * step / recipe.warmup
    if step < start or recipe.decay == 0:
        return recipe.lr
    t = min((step - start) / recipe.decay, 1.0)
    return recipe.lr * (z + (1 - z) * (1 + math.cos(math.pi * t)) / 2)


def balance_terms(kind, probs, counts_of, sequences, previous):
    """E * sum_i f_i * mean p_i of one layer and micro-batch, a mean over its tokens.

    probs [T, E] in row-major (sequence, position) order; counts_of(slice) -> [E] choices there,
    each row summing to tokens * k; `previous` [E] is f of the step before. f has no gradient.
    """
    tokens, experts = probs.shape
    if kind == "sequence":
        size = tokens // sequences
        groups = [slice(i * size, (i + 1) * size) for i in range(sequences)]
    else:
        groups = [slice(0, tokens)]
    terms = []
    for group in groups:
        if kind == "global-batch":
            f = previous
        else:
            counts = counts_of(group)
            f = counts / counts.sum()
        terms.append(experts * (f * probs[group].mean(0)).sum())
    return torch.stack(terms).mean()


def train(forward, parameters, adam, tokens, labels, recipe, top_k):
    """Runs the recipe and returns what was seen, step by step.

    forward(tokens [b, S]) -> logits [b, S, V] and, a layer, the router's probabilities [b*S, E];
    parameters: the tensors to train; adam(parameters, recipe) -> function(lr) that applies their
    gradients; tokens, labels: [steps, global, S], labels of IGNORE take no part in the loss.

    loss = sum of token losses / labels counted over the global batch + coef * balance, where
    balance is the sum over layers of the mean over micro-batches. The logged balance loss is the
    mean over layers and micro-batches, without coef.
    """
    apply, previous, seen = adam(parameters, recipe), None, {}
    log = {k: [] for k in ("loss", "balance_loss", "grad_norm", "lr", "router_ids", "counts")}
    smallest_gap = 1.0
    for step in range(recipe.steps):
        for p in parameters:
            p.grad = None
        wanted = int((labels[step] != IGNORE).sum())
        loss, balance, ids = 0.0, 0.0, []
        micro_batches = recipe.global_batch // recipe.micro_batch
        for m in range(micro_batches):
            rows = slice(m * recipe.micro_batch, (m + 1) * recipe.micro_batch)
            logits, layers = forward(tokens[step, rows])
            token_loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[step, rows].flatten(), ignore_index=IGNORE,
                reduction="sum") / wanted
            total, chosen = token_loss, []
            for layer, probs in enumerate(layers):
                index, _, gap = routing(probs.detach(), top_k)
                smallest_gap = min(smallest_gap, gap)
                chosen.append(index)
                experts = probs.shape[1]
                f = previous[layer] if previous is not None else torch.full(
                    (experts,), 1 / experts, dtype=probs.dtype)
                kind = recipe.balance if recipe.balance != "none" else "micro-batch"
                term = balance_terms(
                    kind, probs,
                    lambda g: torch.bincount(index[g].flatten(), minlength=experts).to(probs.dtype),
                    recipe.micro_batch, f) / micro_batches
                balance += term.item() / len(layers)
                if recipe.balance != "none":
                    total = total + recipe.coef * term
            total.backward()
            loss += token_loss.item()
            ids.append(torch.stack(chosen))
        ids = torch.cat(ids, 1)  # [layers, global*S, k]
        counts = torch.stack([torch.bincount(i.flatten(), minlength=experts) for i in ids])
        previous = counts.to(probs.dtype) / counts.sum(1, keepdim=True)
        if step == 0:
            seen["first_gradients"] = [
                torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        norm = math.sqrt(sum(p.grad.double().square().sum().item()
                             for p in parameters if p.grad is not None))
        for p in parameters:
            if p.grad is not None and norm > recipe.clip:
                p.grad.mul_(recipe.clip / norm)
        lr = learning_rate(recipe, step)
        apply(lr)
        for key, value in (("loss", loss), ("balance_loss", balance), ("grad_norm", norm),
                           ("lr", lr), ("router_ids", ids), ("counts", counts)):
            log[key].append(value)
    seen.update({k: np.array(log[k], np.float64)
                 for k in ("loss", "balance_loss", "grad_norm", "lr")})
    seen["router_ids"] = torch.stack(log["router_ids"]).to(torch.int32)
    seen["counts"] = torch.stack(log["counts"]).to(torch.int32)
    seen["smallest_gap"] = smallest_gap
    return seen


def torch_adamw(parameters, recipe):
    """PyTorch's own AdamW. A parameter without a gradient counts as one with a zero gradient."""
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps,
                                  weight_decay=recipe.weight_decay, foreach=False)

    def apply(lr):
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    return apply


def written_out_adamw(parameters, recipe):
    """AdamW from the formulas (Loshchilov & Hutter 2019, algorithm 2), to check the above."""
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    (b1, b2), step = recipe.betas, 0

    def apply(lr):
        nonlocal step
        step += 1
        with torch.no_grad():
            for p, m, v in zip(parameters, first, second):
                g = torch.zeros_like(p) if p.grad is None else p.grad
                m.mul_(b1).add_((1 - b1) * g)
                v.mul_(b2).add_((1 - b2) * g * g)
                update = (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + recipe.eps)
                p.sub_(lr * (update + recipe.weight_decay * p))

    return apply
