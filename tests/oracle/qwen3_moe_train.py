"""8 training steps of a small Qwen3-MoE with each balance loss, and a 200-step loss curve.

    python tests/oracle/qwen3_moe_train.py

Writes golden/qwen3_moe/train/. transformers' model in FP32 with PyTorch's AdamW makes the
numbers; the float64 forward of qwen3_moe_reference.py with AdamW written out runs the same steps
and must agree, which also bounds what rounding alone can do.
"""

import json

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import common
import qwen3_moe_reference as reference

SEED = 77
VOCAB, END = 67, 0
TOKENS = 54_000
CONFIG = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, num_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=16, norm_topk_prob=True, rms_norm_eps=1e-6, tie_word_embeddings=False,
    max_position_embeddings=64, intermediate_size=32,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0})

SHORT = dict(steps=8, lr=1e-3, warmup=2, decay=4, final_lr=1e-4)
RUNS = {
    "none": common.Recipe(**SHORT),
    "micro_batch": common.Recipe(**SHORT, balance="micro-batch", coef=0.3),
    "sequence": common.Recipe(**SHORT, balance="sequence", coef=0.3),
    "global_batch": common.Recipe(**SHORT, balance="global-batch", coef=0.3),
    "masked": common.Recipe(**SHORT),
}
CURVE = common.Recipe(steps=200, lr=1e-3, warmup=20, decay=40, balance="micro-batch", coef=0.01)

LOSS_BAR, WEIGHT_BAR, CURVE_BAR = 1e-6, 1e-5, 1e-4
SMALLEST_GAP = 1e-5


def markov_text(rng):
    """Documents from a sparse random chain: four successors a token, so a bigram predicts well."""
    follow = np.array([rng.permutation(np.arange(1, VOCAB))[:4] for _ in range(VOCAB)])
    chance = np.array([0.6, 0.25, 0.1, 0.05])
    tokens, ends = [], []
    while len(tokens) < TOKENS:
        length, token = int(rng.integers(40, 200)), END
        for _ in range(length):
            token = int(follow[token, rng.choice(4, p=chance)])
            tokens.append(token)
        tokens.append(END)
        ends.append(len(tokens))
    return np.array(tokens, np.int64), ends


def batches(tokens, recipe):
    """Rows [steps, global, S+1] in file order: sample i is tokens[i*S : i*S+S+1]."""
    size, count = recipe.sequence, recipe.steps * recipe.global_batch
    assert (len(tokens) - 1) // size >= count, "the token file is too short for the run"
    rows = np.stack([tokens[i * size:i * size + size + 1] for i in range(count)])
    return torch.from_numpy(rows.reshape(recipe.steps, recipe.global_batch, size + 1))


def build(weights=None):
    config = Qwen3MoeConfig(**CONFIG)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = Qwen3MoeForCausalLM(config).float()
    if weights is not None:
        model.load_state_dict(weights)
    return model


def with_transformers(weights, tokens, labels, recipe):
    model = build(weights)
    names = [n for n, _ in model.named_parameters()]
    parameters = [p for _, p in model.named_parameters()]

    def forward(batch):
        out = model(input_ids=batch, use_cache=False, output_router_logits=True)
        return out.logits, [r.softmax(-1) for r in out.router_logits]

    seen = common.train(forward, parameters, common.torch_adamw, tokens, labels, recipe,
                        CONFIG["num_experts_per_tok"])
    first = common.checkpoint_form(model, dict(zip(names, seen.pop("first_gradients"))))
    return seen, first, common.checkpoint_form(model)


def with_reference(initial, tokens, labels, recipe):
    weights = {n: t.double().requires_grad_() for n, t in initial.items()}
    flat = reference.flat_config(CONFIG)
    seen = common.train(lambda batch: reference.forward(flat, weights, batch),
                        list(weights.values()), common.written_out_adamw, tokens, labels, recipe,
                        CONFIG["num_experts_per_tok"])
    first = dict(zip(weights, seen.pop("first_gradients")))
    return seen, first, {n: t.detach() for n, t in weights.items()}


def describe(recipe, **more):
    fields = {k: v for k, v in vars(recipe).items()}
    return common.metadata(__file__, SEED, attention="eager", precision="float32",
                           recipe=fields, **more)


def one_run(name, recipe, initial, weights, text, rng, folder):
    rows = batches(text, recipe)
    tokens, labels = rows[..., :-1], rows[..., 1:].clone()
    if name == "masked":  # more and more of a row, so that micro-batches count differently
        share = torch.linspace(0, 0.8, recipe.global_batch)[None, :, None]
        labels[torch.from_numpy(rng.random(labels.shape)) < share] = common.IGNORE
    seen, first, final = with_transformers(weights, tokens, labels, recipe)
    check, check_first, check_final = with_reference(initial, tokens, labels, recipe)
    errors = {k: float(np.max(np.abs(seen[k] - check[k]) / np.abs(check[k])))
              for k in ("loss", "balance_loss", "grad_norm")}
    assert max(errors.values()) <= LOSS_BAR, f"{name}: {errors}"
    assert torch.equal(seen["router_ids"].sort(-1).values, check["router_ids"].sort(-1).values)
    assert seen["smallest_gap"] > SMALLEST_GAP, f"{name}: router gap {seen['smallest_gap']:.1e}"
    errors["first_gradient"] = common.need_close_all(f"{name} gradient", first, check_first, 1e-5)
    errors["final"] = common.need_close_all(f"{name} weights", final, check_final, WEIGHT_BAR)
    clipped = seen["grad_norm"] > recipe.clip
    tensors = {"tokens": tokens.int(), "labels": labels.int(),
               "router_ids": seen["router_ids"], "counts": seen["counts"]}
    tensors |= {k: seen[k] for k in ("loss", "balance_loss", "grad_norm", "lr")}
    tensors |= {f"first_grad.{n}": t for n, t in first.items()}
    tensors |= {f"final.{n}": t for n, t in final.items()}
    meta = describe(recipe, smallest_router_gap=seen["smallest_gap"], float64_reference=errors)
    common.save_safetensors(folder / f"{name}.safetensors", tensors, meta)
    print(f"{name}: loss {seen['loss'][0]:.4f} -> {seen['loss'][-1]:.4f}, "
          f"balance {seen['balance_loss'].round(3).tolist()}, "
          f"norm {seen['grad_norm'].round(3).tolist()}, clipped {int(clipped.sum())}/8, "
          f"gap {seen['smallest_gap']:.1e}, against float64 {errors}")
    return seen, clipped


def curve(initial, weights, text, folder):
    rows = batches(text, CURVE)
    tokens, labels = rows[..., :-1], rows[..., 1:]
    loss = with_transformers(weights, tokens, labels, CURVE)[0]["loss"]
    check = with_reference(initial, tokens, labels, CURVE)[0]["loss"]
    window, check_window = loss[180:].mean(), check[180:].mean()
    off = abs(window / check_window - 1)
    assert off <= CURVE_BAR, f"window {window} against {check_window} in float64"
    common.save_safetensors(folder / "curve.safetensors",
                            {"loss": loss, "window_180_200": np.array([window])},
                            describe(CURVE, float64_window_error=off))
    print(f"curve: loss {loss[0]:.4f} -> {window:.4f} (steps 180-199), "
          f"float64 off by {off:.1e}, largest a step {np.max(np.abs(loss / check - 1)):.1e}")


def make(folder):
    rng = common.generator(SEED)
    text, ends = markov_text(rng)
    common.save_tokens(folder / "corpus.bin", text, ends)
    model = build()
    common.randomise(model, rng, 0.1, (("embed_tokens", 0.5), ("mlp.gate", 0.4), ("lm_head", 0.13)))
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    model.save_pretrained(folder / "init")
    (folder / "init" / "generation_config.json").unlink()
    initial = common.load_safetensors(folder / "init" / "model.safetensors")
    print(f"{sum(t.numel() for t in initial.values())} parameters")

    results = {n: one_run(n, r, initial, weights, text, rng, folder) for n, r in RUNS.items()}
    for name, (seen, clipped) in results.items():
        assert clipped.any() and not clipped.all(), f"{name}: the clip must bite in some steps"
        if name != "none":
            other = abs(seen["grad_norm"] / results["none"][0]["grad_norm"] - 1).max()
            assert other > 1e-3, f"{name}: hardly differs from none"
    curve(initial, weights, text, folder)


if __name__ == "__main__":
    common.start()
    with common.replaced(common.GOLDEN / "qwen3_moe" / "train") as new_folder:
        make(new_folder)
