"""Qwen3-MoE written out in float64, from the formulas, on tensors under checkpoint names.

Independent of transformers' modules: it cross-checks them (they compute norms, RoPE and softmax in
FP32 whatever the weights are). Every expert runs on every token and the routing weight is zero
where the token was not sent, so there is no dispatch that could be wrong.
"""

import torch


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rope(x, positions, theta):
    """x [B, S, N, d], positions [B, S]: the pair (j, j + d/2) turns by position * theta^(-2j/d)."""
    half = x.shape[-1] // 2
    speed = theta ** (-2.0 * torch.arange(half, dtype=x.dtype) / x.shape[-1])
    angle = (positions[..., None].to(x.dtype) * speed)[:, :, None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attention(c, w, x, positions, visible):
    batch, length, _ = x.shape
    kv, d = c["num_key_value_heads"], c["head_dim"]
    per_kv = c["num_attention_heads"] // kv
    q = (x @ w["q_proj.weight"].T).view(batch, length, kv * per_kv, d)
    k = (x @ w["k_proj.weight"].T).view(batch, length, kv, d)
    v = (x @ w["v_proj.weight"].T).view(batch, length, kv, d)
    q = rope(rms_norm(q, w["q_norm.weight"], c["rms_norm_eps"]), positions, c["rope_theta"])
    k = rope(rms_norm(k, w["k_norm.weight"], c["rms_norm_eps"]), positions, c["rope_theta"])
    q = q.view(batch, length, kv, per_kv, d)
    scores = torch.einsum("bsgrd,btgd->bgrst", q, k) / d**0.5
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    out = torch.einsum("bgrst,btgd->bsgrd", scores.softmax(-1), v)
    return out.reshape(batch, length, kv * per_kv * d) @ w["o_proj.weight"].T


def experts(c, w, x, probs):
    """x [T, H], probs [T, E] -> [T, H]."""
    chosen = probs.topk(c["num_experts_per_tok"], -1).indices
    weight = probs * torch.zeros_like(probs).scatter(1, chosen, 1.0)
    if c["norm_topk_prob"]:
        weight = weight / weight.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e in range(c["num_experts"]):
        gate = x @ w[f"experts.{e}.gate_proj.weight"].T
        up = x @ w[f"experts.{e}.up_proj.weight"].T
        hidden = gate * torch.sigmoid(gate) * up
        out = out + weight[:, e, None] * (hidden @ w[f"experts.{e}.down_proj.weight"].T)
    return out


def forward(c, weights, tokens, doc_ends=None):
    """Logits [B, S, V] and, a layer, the router's probabilities [B*S, E].

    c: the plain dict of flat_config(); doc_ends [B, S]: one past the last position of the
    document that the position belongs to (default: one document a row).
    """
    batch, length = tokens.shape
    if doc_ends is None:
        doc_ends = torch.full((batch, length), length)
    index = torch.arange(length)
    same = doc_ends[:, :, None] == doc_ends[:, None, :]
    visible = same & (index[:, None] >= index[None, :])
    positions = visible.sum(-1) - 1
    x, probs = weights["model.embed_tokens.weight"][tokens], []
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        w = {n[len(prefix):]: t for n, t in weights.items() if n.startswith(prefix)}

        def part(name):
            return {n[len(name):]: t for n, t in w.items() if n.startswith(name)}

        h = rms_norm(x, w["input_layernorm.weight"], c["rms_norm_eps"])
        x = x + attention(c, part("self_attn."), h, positions, visible)
        h = rms_norm(x, w["post_attention_layernorm.weight"], c["rms_norm_eps"]).flatten(0, 1)
        probs.append((h @ w["mlp.gate.weight"].T).softmax(-1))
        x = x + experts(c, part("mlp."), h, probs[-1]).view_as(x)
    x = rms_norm(x, weights["model.norm.weight"], c["rms_norm_eps"])
    return x @ weights["lm_head.weight"].T, probs


def flat_config(config):
    """The fields that matter, from a config.json dict in either spelling."""
    out = {k: config[k] for k in (
        "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "num_experts_per_tok", "norm_topk_prob", "rms_norm_eps")}
    out["num_experts"] = config.get("num_experts", config.get("num_local_experts"))
    out["rope_theta"] = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    return out
