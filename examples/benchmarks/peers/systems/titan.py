"""torchtitan's Qwen3-MoE: its model, dispatcher, EP, FSDP2 and optimizer, in a loop of our own.

Its trainer does not start on CPU. Changed to run here, without changing what is computed: the
device type, SDPA instead of flex attention, and sums instead of gloo's missing PREMUL_SUM. For
float32, experts keep the dtype of their input, where torchtitan always computes in bfloat16.
"""
# It has requirements that exclude others, so it lives in an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers.systems.titan_on_cpu import DEVICE

# isort: split
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchtitan.distributed.utils as titan_distributed
import torchtitan.models.qwen3 as qwen3
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.components.loss import cross_entropy_loss
from torchtitan.components.optimizer.optimizer import default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.trainer import Trainer as TitanTrainer

from peers.model import CLIP, DECAY, RATE, batch_of, read_model
from peers.shapes import Job
from peers.trainer import Trainer, mean_over_ranks

BACKEND = "partial_dtensor"  # the default needs a newer torch than there is


@contextmanager
def start(job: Job, weights: Path) -> Iterator[Trainer]:
    qwen3.get_attention_config = lambda backend: ScaledDotProductAttention.Config()
    if job.dtype == "float32":
        GroupedExperts.forward = _experts_in_their_dtype
    torch.autograd.set_multithreading_enabled(False)  # as torchtitan does when it starts
    dist.init_process_group("gloo")
    titan_distributed.set_spmd_backend(BACKEND)
    config, model, dims = _parallel_model(job)
    parameters = sum(p.numel() for p in model.parameters())
    _load(model, config, weights)
    adamw = default_adamw(lr=RATE, weight_decay=DECAY)
    adamw.implementation = "fused"
    optimizer = adamw.build(model_parts=[model])
    context = titan_distributed.get_spmd_context(parallel_dims=dims)
    positions = torch.arange(job.length).expand(job.sequences, -1)

    def step(i: int) -> float:
        ids, targets = batch_of(job, i, dist.get_rank())
        optimizer.zero_grad()
        with context():
            loss = cross_entropy_loss(model(ids, positions=positions), targets) / job.tokens
            loss.backward()
        titan_distributed.clip_grad_norm_(
            list(model.parameters()), CLIP, foreach=True, ep_enabled=dims.ep_enabled
        )
        optimizer.step()
        return mean_over_ranks(loss) * job.ranks  # each rank has divided by all tokens

    yield Trainer(step, parameters)
    dist.destroy_process_group()


def _parallel_model(job: Job) -> tuple[Any, Any, Any]:
    parallelism = ParallelismConfig(
        data_parallel_shard_degree=job.ranks,
        expert_parallel_degree=job.ranks,
        spmd_backend=BACKEND,
    )
    training = TrainingConfig(
        local_batch_size=job.sequences,
        seq_len=job.length,
        max_norm=CLIP,
        disable_cuda_graphs=True,
        mixed_precision_param=job.dtype,
    )
    dims = ParallelDims.from_config(parallelism, job.ranks)
    dims.build_mesh()
    config = _model_config(job)
    config.update_from_config(
        config=TitanTrainer.Config(training=training, parallelism=parallelism)
    )
    with torch.device("meta"):
        model = config.build()
    model = qwen3.parallelize_qwen3(
        model,
        parallel_dims=dims,
        training=training,
        parallelism=parallelism,
        compile_config=CompileConfig(enable=False),
        ac_config=None,
        dump_folder="",
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=DEVICE)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    return config, model.train(), dims


def _model_config(job: Job) -> Any:
    shape = job.shape
    layers = qwen3._build_qwen3_moe_layers(
        n_layers=shape.layers,
        dim=shape.hidden,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        moe_hidden_dim=shape.width,
        num_experts=shape.experts,
        top_k=shape.top_k,
        fuse_qkv=False,
        attn_backend="sdpa",
        moe_comm_backend="standard",
        rope=CosSinRoPE.Config(
            dim=shape.head_dim, max_seq_len=max(job.length, 256), theta=10_000.0
        ),
    )
    for layer in layers:
        layer.moe.load_balance_coeff = None
    return qwen3.Qwen3Model.Config(
        vocab_size=shape.vocab,
        dim=shape.hidden,
        norm=qwen3._qwen3_norm(shape.hidden),
        tok_embeddings=Embedding.Config(
            num_embeddings=shape.vocab,
            embedding_dim=shape.hidden,
            param_init=qwen3._EMBEDDING_INIT,
        ),
        lm_head=Linear.Config(
            in_features=shape.hidden, out_features=shape.vocab, param_init=qwen3._LINEAR_INIT
        ),
        layers=layers,
    )


def _load(model: Any, config: Any, weights: Path) -> None:
    """transformers' weights by torchtitan's adapter, which knows experts one by one."""
    apart: dict[str, Tensor] = {}
    for name, w in read_model(weights).state_dict().items():
        stem = name.removesuffix("gate_up_proj").removesuffix("down_proj")
        for e in range(len(w) if stem != name else 0):
            if name.endswith("gate_up_proj"):
                gate, up = w[e].chunk(2)
                apart |= {f"{stem}{e}.gate_proj.weight": gate, f"{stem}{e}.up_proj.weight": up}
            else:
                apart[f"{stem}{e}.down_proj.weight"] = w[e]
        if stem == name:
            apart[name] = w
    whole = Qwen3StateDictAdapter(config, None).from_hf(apart)
    with torch.no_grad():
        for name, p in model.state_dict().items():
            w = whole.pop(name)
            if isinstance(p, DTensor):
                shard = distribute_tensor(w, p.device_mesh, p.placements, src_data_rank=None)
                p.to_local().copy_(shard.to_local())
            else:
                p.copy_(w)
    if whole:
        raise ValueError(f"torchtitan's model has no place for {sorted(whole)}")


def _experts_in_their_dtype(self: Any, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    gate, down, up = (
        w.to_local().transpose(-2, -1) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
    )
    ends = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    h_RF = F.silu(self._grouped_mm(A=x_RD, B_t=gate, offs=ends))
    h_RF = h_RF * self._grouped_mm(A=x_RD, B_t=up, offs=ends)
    return self._grouped_mm(A=h_RF, B_t=down, offs=ends)
