"""The models as the papers draw them: whole sequences in order, dense masks, one formula a line.

Written against FACTS 1 from a `state_dict` alone; shares no code with `pgm_scale.models`. Everything is
fp64, so that what a comparison shows is the error of the other side.
"""

import math
from functools import partial

import torch

arange = partial(torch.arange, dtype=torch.float64)


def partition_transformer(state, config, tokens_BL, groups_BL, classes_B=None):
    """Logits [B, L, V] of every position, from clean tokens and the 0/1 group of each.

    With registers (FACTS 2.1) the rows are [R/2 of group 1][R/2 of group 0][tokens] inside.
    """
    net = Net(state, config.num_heads)
    table = "cls_embed.embedding_table.weight"
    condition = net.condition() if classes_B is None else net[table][classes_B][:, None]
    x = net["vocab_embed.embedding"][tokens_BL]
    sequences, half = len(tokens_BL), config.registers // 2
    if half:
        x = torch.cat([torch.stack([net["reg_tokens.weight"]] * sequences), x], 1)
        front = torch.tensor([[1] * half + [0] * half] * sequences)
        groups_BL = torch.cat([front, groups_BL], 1)
    same_BLL = groups_BL[:, :, None] == groups_BL[:, None, :]
    for i in range(config.num_encoder_blocks):
        x = net.self_attention_block(f"encoder.blocks.{i}", x, same_BLL, condition)
    out = group_swap(net, config, x, ~same_BLL)
    for j in range(config.num_decoder_blocks):
        out = net.cross_attention_block(f"decoder.layers.{j}", out, x, ~same_BLL, condition)
    return net.output(out, condition)[:, 2 * half :]


def group_swap(net, config, x, mask_BLL):
    b, length, hidden = x.shape
    name = "decoder.group_swap."
    q = net[name + "base_embedding"].expand(b, length, hidden)
    if "freqs" in config.group_swap_query:
        angles = arange(length)[:, None] * 10000.0 ** (-arange(0, hidden, 2) / hidden)
        q = q + torch.cat([angles.cos(), angles.sin()], -1)
    if config.group_swap_query.endswith("mean"):
        counts = mask_BLL.sum(-1, keepdim=True).clamp(min=1)
        q = q + mask_BLL.to(torch.float64) @ x / counts
    if config.group_swap_query.endswith("logsumexp"):
        spread = x[:, None].masked_fill(~mask_BLL[..., None], -torch.inf)
        is_empty = ~mask_BLL.any(-1)[..., None]
        q = q + torch.where(is_empty, 0.0, spread.masked_fill(is_empty[..., None], 0.0).logsumexp(2))
    q = (
        torch.nn.functional.layer_norm(q, (hidden,), net[name + "pre_query_norm.weight"])
        + net[name + "pre_query_norm.bias"]
    )
    if config.group_swap_processor == "linear":
        q = net.linear(name + "query_processor", q)
    else:
        q = net.linear(name + "query_processor.0", q)
        q = net.linear(name + "query_processor.2", q * torch.sigmoid(q))
    k, v = net.linear(name + "hidden_to_key_value", x).split(hidden, -1)
    return net.linear(name + "output_linear", net.attention(q, k, v, mask_BLL))


def diffusion_transformer(state, config, tokens_BL, sigma_B):
    net = Net(state, config.num_heads)
    everything = torch.ones(1, tokens_BL.shape[1], tokens_BL.shape[1], dtype=torch.bool)
    condition = net.condition(sigma_B)
    x = net["vocab_embed.embedding"][tokens_BL]
    for i in range(config.num_blocks):
        x = net.self_attention_block(f"blocks.{i}", x, everything, condition)
    return net.output(x, condition)


def autoregressive_transformer(state, config, tokens_BL):
    net = Net(state, config.num_heads)
    causal = torch.ones(1, tokens_BL.shape[1], tokens_BL.shape[1], dtype=torch.bool).tril()
    x = net["vocab_embed.embedding"][tokens_BL]
    for i in range(config.num_blocks):
        x = net.self_attention_block(f"blocks.{i}", x, causal, None)
    return net.output(x, None)


class Net:
    def __init__(self, state, num_heads):
        self.state = {name: tensor.double() for name, tensor in state.items()}
        self.num_heads = num_heads

    def __getitem__(self, name):
        return self.state[name]

    def linear(self, name, x):
        out = x @ self[name + ".weight"].T
        return out + self[name + ".bias"] if name + ".bias" in self.state else out

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self[name + ".weight"]

    def condition(self, sigma_B=None):
        sigma_B = torch.zeros(1) if sigma_B is None else sigma_B.double()
        angles = sigma_B[:, None] * torch.exp(-math.log(10000) * arange(128) / 128)
        hidden = self.linear("sigma_map.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))
        out = self.linear("sigma_map.mlp.2", hidden * torch.sigmoid(hidden))
        return (out * torch.sigmoid(out))[:, None]

    def modulation(self, name, condition, parts):
        if condition is None:
            return (0.0, 0.0, 1.0) * (parts // 3) + (0.0, 0.0) * (parts % 3 // 2)
        return self.linear(name + ".adaLN_modulation", condition).chunk(parts, -1)

    def rope(self, x):
        length, half = x.shape[1], x.shape[-1] // 2
        angles = arange(length)[:, None] * 10000.0 ** (-arange(half) / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attention(self, q, k, v, mask_BLL):
        """softmax(q k / sqrt(D)) v over the allowed keys; 0 where no key is allowed."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))
        scores = torch.einsum("bqnd,bknd->bnqk", self.rope(q), self.rope(k)) / math.sqrt(q.shape[-1])
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp() * mask_BLL[:, None]
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        return torch.einsum("bnqk,bknd->bqnd", weights, v).flatten(-2)

    def mlp(self, name, x):
        x = self.linear(name + ".mlp.0", x)
        x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return self.linear(name + ".mlp.2", x)

    def self_attention_block(self, name, x, mask_BLL, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(name, condition, 6)
        fused = self.linear(name + ".attn_qkv", self.norm(name + ".norm1", x) * (1 + scale1) + shift1)
        q, k, v = fused.split(x.shape[-1], -1)
        attended = self.attention(q, k, v, mask_BLL)
        x = x + gate1 * self.linear(name + ".attn_out", attended)
        return x + gate2 * self.mlp(name, self.norm(name + ".norm2", x) * (1 + scale2) + shift2)

    def cross_attention_block(self, name, x, encoded, mask_BLL, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(name, condition, 6)
        q = self.linear(name + ".attn_q", self.norm(name + ".q_norm1", x) * (1 + scale1) + shift1)
        k, v = self.linear(name + ".attn_kv", self.norm(name + ".kv_norm1", encoded)).split(x.shape[-1], -1)
        x = x + gate1 * self.linear(name + ".attn_out", self.attention(q, k, v, mask_BLL))
        return x + gate2 * self.mlp(name, self.norm(name + ".norm2", x) * (1 + scale2) + shift2)

    def output(self, x, condition):
        shift, scale = self.modulation("output_layer", condition, 2)
        return self.linear(
            "output_layer.linear", self.norm("output_layer.norm_final", x) * (1 + scale) + shift
        )
