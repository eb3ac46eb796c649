"""Logits, loss and every gradient of two small random Qwen3-MoE models -> golden/qwen3_moe/.

    python tests/oracle/qwen3_moe_goldens.py

transformers in FP32 with eager attention makes the numbers; qwen3_moe_reference.py (float64)
must agree with it to 1e-5, and the routing must have no near-ties, or nothing is written.
"""

import json

import torch
from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

import common
import qwen3_moe_reference as reference

SMALLEST_GAP = 1e-4
BAR = 1e-5

SHARED = dict(rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=64,
              intermediate_size=32)

CASES = {
    # name: (seed, std, batch, sequence, document ends of each row, configuration)
    "normed": (11, 0.2, 2, 23, [[7, 8, 23], [5, 16, 23]], dict(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=16, num_experts=5, num_experts_per_tok=2,
        moe_intermediate_size=20, norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
    "raw": (17, 0.15, 3, 17, [[1, 17], [17], [4, 9, 16, 17]], dict(
        vocab_size=131, hidden_size=56, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, head_dim=12, num_experts=8, num_experts_per_tok=3,
        moe_intermediate_size=10, norm_topk_prob=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})),
}


def build(config):
    config = Qwen3MoeConfig(**SHARED, **config)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return Qwen3MoeForCausalLM(config).float().eval()


def run(model, tokens, labels):
    """(logits, loss, gradients by checkpoint name, router probabilities a layer)"""
    model.zero_grad()
    out = model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False,
                output_router_logits=True)
    logits = out.logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=common.IGNORE)
    balance = model.config.router_aux_loss_coef * out.aux_loss
    common.need_close("transformers' own loss", out.loss - balance, loss, 1e-6)
    loss.backward()
    grads = common.checkpoint_form(model, common.gradients(model))
    probs = [r.detach().softmax(-1) for r in out.router_logits]
    return logits.detach(), loss.detach(), grads, probs


def run_documents(model, tokens, labels, ends):
    """Each document alone through the model: positions restart and nothing is seen across."""
    model.zero_grad()
    rows = []
    for row, row_ends in enumerate(ends):
        parts, begin = [], 0
        for end in row_ends:
            parts.append(model(input_ids=tokens[row:row + 1, begin:end], use_cache=False).logits)
            begin = end
        rows.append(torch.cat(parts, 1))
    logits = torch.cat(rows)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=common.IGNORE)
    loss.backward()
    grads = common.checkpoint_form(model, common.gradients(model))
    return logits.detach(), loss.detach(), grads


def run_reference(config, weights, tokens, labels, doc_ends=None):
    weights = {n: t.double().requires_grad_() for n, t in weights.items()}
    logits, probs = reference.forward(config, weights, tokens, doc_ends)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=common.IGNORE)
    loss.backward()
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in weights.items()}
    return logits.detach(), loss.detach(), grads, probs


def published_spelling(path):
    """Rewrites config.json with the keys of the published Qwen3-MoE checkpoints."""
    config = json.loads(path.read_text())
    config["num_experts"] = config.pop("num_local_experts")
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make(name, folder):
    """Writes one case into `folder` and returns a line about it."""
    seed, std, batch, length, ends, config = CASES[name]
    rng = common.generator(seed)
    model = build(config)
    common.randomise(model, rng, std)
    tokens = torch.from_numpy(rng.integers(0, config["vocab_size"], (batch, length)))
    labels = torch.from_numpy(rng.integers(0, config["vocab_size"], (batch, length)))
    labels[torch.from_numpy(rng.random((batch, length)) < 0.2)] = common.IGNORE
    logits, loss, grads, probs = run(model, tokens, labels)

    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if name == "raw":
        published_spelling(folder / "config.json")
    again = Qwen3MoeForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager").eval()
    assert torch.equal(again(input_ids=tokens, use_cache=False).logits, logits), "reload differs"
    assert AutoConfig.from_pretrained(folder).rope_parameters == config["rope_parameters"]

    flat = reference.flat_config(json.loads((folder / "config.json").read_text()))
    weights = common.load_safetensors(folder / "model.safetensors")
    doc_ends = torch.zeros_like(tokens)
    for row, row_ends in enumerate(ends):
        for end in reversed(row_ends):
            doc_ends[row, :end] = end

    tensors = {"tokens": tokens.int(), "labels": labels.int(), "logits": logits,
               "loss": loss.reshape(1), "doc_ends": doc_ends.int()}
    tensors |= {f"grad.{n}": g for n, g in grads.items()}
    gap = 1.0
    for layer, p in enumerate(probs):
        ids, chosen, layer_gap = common.routing(p, config["num_experts_per_tok"])
        order = (chosen[:, :-1] - chosen[:, 1:]).min().item()
        gap = min(gap, layer_gap, order)
        weight = chosen / chosen.sum(-1, keepdim=True) if config["norm_topk_prob"] else chosen
        tensors |= {f"router_ids.{layer}": ids.int(), f"router_weights.{layer}": weight,
                    f"router_probs.{layer}": p}
    assert gap > SMALLEST_GAP, f"{name}: router gap {gap:.1e}; choose another seed"

    want = run_reference(flat, weights, tokens, labels)
    worst = [common.need_close(f"{name} logits", logits, want[0], BAR),
             common.need_close(f"{name} loss", loss, want[1], BAR),
             common.need_close_all(f"{name} gradient", grads, want[2], BAR)]
    for a, b in zip(probs, want[3]):
        common.need_close(f"{name} router", a, b, BAR)
    meta = common.metadata(__file__, seed, std=std, attention="eager", precision="float32",
                           smallest_router_gap=gap,
                           float64_reference={"logits": worst[0], "loss": worst[1],
                                              "worst_gradient": worst[2]})

    doc = run_documents(model, tokens, labels, ends)
    want = run_reference(flat, weights, tokens, labels, doc_ends)
    common.need_close(f"{name} document logits", doc[0], want[0], BAR)
    common.need_close(f"{name} document loss", doc[1], want[1], BAR)
    common.need_close_all(f"{name} document gradient", doc[2], want[2], BAR)
    assert common.relative_error(doc[0], logits) > 1e-2, "the documents change nothing"
    tensors |= {"documents.logits": doc[0], "documents.loss": doc[1].reshape(1)}
    if name == "normed":
        tensors |= {f"documents.grad.{n}": g for n, g in doc[2].items()}

    common.save_safetensors(folder / "golden.safetensors", tensors, meta)
    idle = sum(1 for n, g in grads.items() if not g.any())
    return (f"{name}: loss {loss.item():.6f}, documents {doc[1].item():.6f}, "
            f"router gap {gap:.1e}, float64 logits {worst[0]:.1e}, gradients {worst[2][0]:.1e}, "
            f"{idle} all-zero gradients, {common.check_size(folder)} bytes")


if __name__ == "__main__":
    common.start()
    for case in CASES:
        with common.replaced(common.GOLDEN / "qwen3_moe" / case) as new_folder:
            print(make(case, new_folder))
