"""DeepSpeed: its configuration, the sharded model, and each rank's part of the training state.

The only module that imports deepspeed. ZeRO (Rajbhandari et al., 2020) shards the optimizer states (1),
gradients (2) and weights (3) over the ranks of a data-parallel group; tensor parallel shares are made
before, by `parallel`, and DeepSpeed is told of them by the mpu.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# It calls torch by names that torch renames; one line for each call would drown the log.
warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.")
# Its shared-memory all-reduce for CPUs wants a compiler and a minute at the first start; gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

from bertscale.checkpoint import (  # noqa: E402
    FORMAT,
    STATES,
    Checkpoint,
    Piece,
    commit,
    shard_name,
    write_shard,
)
from bertscale.clipping import set_clipping, whole_norm  # noqa: E402
from bertscale.config import PretrainConfig, UserError  # noqa: E402
from bertscale.files import fresh_folder, partial_folder  # noqa: E402
from bertscale.layout import Layout, Parameter, Segment  # noqa: E402
from bertscale.model import PretrainingModel, initial_value  # noqa: E402
from bertscale.optim import is_matrix, make_optimizer  # noqa: E402
from bertscale.optimizers import (  # noqa: E402
    Lamb,
    Muon,
    StableAdamW,
    WholeOptimizer,
    first_moments,
    gradient_of,
)
from bertscale.parallel import (  # noqa: E402
    ModelParallelUnit,
    Ranks,
    take_share,
    tensor_parallel_dimension,
)

# It warns of optimizers that it does not know; ours are tested under each of its stages.
deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS += [StableAdamW, Lamb, Muon]

BUCKET = 40_000_000  # gradients that travel together: megatron-core's least; DeepSpeed's is a whole BERT


def deepspeed_config(
    config: PretrainConfig, ranks: Ranks, dtype: torch.dtype, *, clips: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration for this run; `clips`: whether it clips gradients and looks for such as are
    not finite, for which it makes the host wait for the device in each step."""
    train, stage = config.train, config.parallel.zero_stage
    micro = train.micro_samples or 1  # `backward` is told when a step ends, however many there are
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": train.global_batch // (micro * ranks.data),
        "gradient_clipping": config.optimizer.gradient_clipping if clips else 0.0,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": clips},
        "zero_optimization": {
            "stage": stage,
            "compute_grad_norm": clips or stage == 0,
            # The backward pass goes on while gradients travel, some of them at a time.
            "overlap_comm": stage > 0 and ranks.data > 1,
            "reduce_bucket_size": BUCKET,
        },
        "steps_per_print": 2**62,
    }


def _graph_tokens(config: PretrainConfig, ranks: Ranks) -> int | None:
    """Tokens of a micro-batch at most, where its layers are replayed as CUDA graphs."""
    train, stage = config.train, config.parallel.zero_stage
    if train.compile != "graphs":
        return None
    if stage != 2 and train.micro_samples != train.global_batch // ranks.data:
        raise UserError(
            f"train.compile=graphs with parallel.zero_stage={stage} wants each rank's part of a step in one "
            "micro-batch, for between two of them gradients stay where the graphs write: take "
            "parallel.zero_stage=2, or train.micro_batch as large as that part"
        )
    return train.micro_tokens or train.micro_batch * config.samples.max_length


class Engine:
    """The sharded model and optimizer, and the way in and out of their state."""

    def __init__(self, config: PretrainConfig, vocab_size: int, ranks: Ranks, dtype: torch.dtype) -> None:
        """Builds the model shard by shard; weights are undefined until `start` or `resume`."""
        self.config, self.ranks, self.stage = config, ranks, config.parallel.zero_stage
        self.vocab_size = vocab_size
        # Those two paths of DeepSpeed's leave nobody else the time to clip.
        self.deepspeed_clips = self.stage == 3 or (self.stage == 0 and dtype == torch.bfloat16)
        self.norm, self.taken = torch.zeros(()), torch.ones(())
        settings = deepspeed_config(config, ranks, dtype, clips=self.deepspeed_clips)
        mpu = ModelParallelUnit(ranks)
        if deepspeed.comm.comm.cdb is None:
            deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        with deepspeed.zero.Init(
            config_dict_or_path=settings,
            mpu=mpu,
            data_parallel_group=ranks.data_group,  # without it shards go over all ranks: silently wrong
            enabled=self.stage == 3,
        ):
            recompute = config.train.activation_checkpointing
            layers = ranks.layers(config.parallel.sequence)
            self.model = PretrainingModel(config.model, vocab_size, layers, recompute)
        if config.compiles(ranks.device.type):
            self.model.encoder.compile_layers(
                fused=dtype != torch.float32 and ranks.device.type == "cuda",
                graph_tokens=_graph_tokens(config, ranks),
            )
        for name, parameter in self.model.named_parameters():
            # Without the mark DeepSpeed counts the share of one rank alone into the gradient norm.
            parameter.tensor_model_parallel = tensor_parallel_dimension(name) is not None  # type: ignore[attr-defined]
        self.deepspeed, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=make_optimizer(self.model, config.optimizer, config.model, dtype),
            config=settings,
            mpu=mpu,
            dist_init_required=False,
        )
        self.parameters = dict(self.model.named_parameters())
        self.places = self._places()
        optimizer = self._optimizer()
        optimizer.state.clear()  # without ZeRO DeepSpeed has made one step under bfloat16, on no gradient
        if isinstance(optimizer, WholeOptimizer):
            self._lay_out(optimizer)

    # ------------------------------------------------------------------------------------- training

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.deepspeed(*inputs)
        return outputs

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of `loss`, which the caller has divided by all that it must be divided by.

        `last`: of the micro-batches of this global step.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> None:
        """Ends a micro-step; at the end of the global step: all-reduce, clip, update.

        `taken` is then 1, or 0 if the gradient was not finite and has changed nothing: float32, 0-dim.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        ends = self.deepspeed.is_gradient_accumulation_boundary()
        if ends and not self.deepspeed_clips:
            self.norm = whole_norm(self._gradients(), self.ranks, sharded=self.stage > 0)
            largest = self.config.optimizer.gradient_clipping
            self.taken = set_clipping(self._optimizer(), self.norm, largest)
        self.deepspeed.step()
        if ends and self.deepspeed_clips:
            taken = float(self.deepspeed.was_step_applied())
            self.taken = torch.full((), taken, device=self.ranks.device)

    def _gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's pieces of the gradient of the step that ends, with the names of their parameters."""
        if self.stage == 0:
            yield from ((name, gradient_of(parameter)) for name, parameter in self.parameters.items())
            return
        zero, names = self.deepspeed.optimizer, {id(p): name for name, p in self.parameters.items()}
        for group, gradients in zero.averaged_gradients.items():
            # Behind the parameters' there may be one of zeros, which fills up the last rank's part.
            for parameter, gradient in zip(zero.params_in_partition[group], gradients, strict=False):
                yield names[id(parameter)], gradient

    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the last step, before clipping. Waits for the device."""
        return float(self.deepspeed.get_global_grad_norm() if self.deepspeed_clips else self.norm)

    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(torch.Size(self._global_shape(name)).numel() for name in self.parameters)

    # ---------------------------------------------------------------------------------------- state

    def start(self, seed: int) -> None:
        """First weights: `model.initial_value` of each parameter."""

        def first_value(name: str, state: str) -> Tensor:
            return initial_value(name, self._global_shape(name), self.config.model, self.vocab_size, seed)

        self._fill(first_value, ("weight",))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Weights, moments and step of a checkpoint of any topology."""
        missing = set(self.parameters) ^ set(checkpoint.parameters)
        if missing:
            raise UserError(f"the checkpoint {checkpoint.folder} is of another model: {min(missing)} differs")
        for name, entry in checkpoint.parameters.items():
            if entry["shape"] != self._global_shape(name):
                raise UserError(
                    f"the checkpoint {checkpoint.folder} is of another model: {name} is {entry['shape']}, "
                    f"the config makes it {self._global_shape(name)}"
                )
            for state in self._states(name) if checkpoint.has_moments else ():
                if state not in entry.get("states", STATES):
                    raise UserError(
                        f"the checkpoint {checkpoint.folder} has no {state} of {name}, which "
                        f"optimizer.name={self.config.optimizer.name} needs; go on with muon"
                    )
        self._fill(checkpoint.tensor, STATES if checkpoint.has_moments else ("weight",))
        for state in self._optimizer().state.values():
            state["step"].fill_(checkpoint.step - checkpoint.skipped_steps)

    def pieces(self) -> list[Piece]:
        """This rank's part of the state, as views: what is written into them is trained on."""
        states = self._optimizer().state
        for tensor, names in self._tensors():  # moments come to life at the first step; they are needed now
            first_moments(states[tensor], tensor, second="exp_avg_sq" in self._states(names[0]))
        pieces = []
        for name, (tensor, offset, start, length) in self.places.items():
            values = {"weight": tensor.data, **states[tensor]}
            views = {key: values[key].view(-1).narrow(0, offset, length) for key in self._states(name)}
            pieces.append(Piece(name, start, views))
        return pieces

    def _states(self, name: str) -> tuple[str, ...]:
        """What the optimizer keeps of the parameter, its weight included."""
        muon = self.config.optimizer.name == "muon" and is_matrix(name)
        return STATES[:2] if muon else STATES

    def _fill(self, read: Callable[[str, str], Tensor], states: tuple[str, ...]) -> None:
        pieces = {piece.name: piece for piece in self.pieces()}
        for name, parameter in self.parameters.items():
            for state in states:
                whole_too = state == "weight" and self.stage < 3
                if state not in self._states(name) or not (whole_too or name in pieces):
                    continue
                share = take_share(read(name, state), name, self.ranks.tensor, self.ranks.tensor_rank)
                if name in pieces:
                    target = pieces[name].states[state]
                    start = pieces[name].start
                    target.copy_(share.flatten()[start : start + target.numel()])
                if whole_too:
                    parameter.data.copy_(share)
        if self.stage == 3:
            zero = self.deepspeed.optimizer
            zero._partition_all_parameters()
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)

    def _optimizer(self) -> torch.optim.Optimizer:
        """torch's optimizer under DeepSpeed's wrapper; its state is keyed by the float32 tensors."""
        wrapper = self.deepspeed.optimizer
        inner: torch.optim.Optimizer = getattr(wrapper, "optimizer", wrapper)
        return inner

    def _tensors(self) -> list[tuple[Tensor, list[str]]]:
        """The float32 tensors that the optimizer updates, and what lies in each, on whichever data rank.

        ZeRO lays groups of parameters flat and keeps a part of them; without it they stay what they are,
        under bfloat16 beside float32 copies.
        """
        wrapper, names = self.deepspeed.optimizer, {id(p): name for name, p in self.parameters.items()}
        groups: Iterable[tuple[Tensor, Iterable[Tensor]]]
        if self.stage == 3:
            groups = zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
        elif self.stage > 0:
            groups = zip(wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups, strict=True)
        elif hasattr(wrapper, "fp32_groups"):
            pairs = zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
            groups = ((copy, [p]) for pair in pairs for copy, p in zip(*pair, strict=True))
        else:
            groups = ((p, [p]) for p in self.parameters.values())
        return [(tensor, [names[id(parameter)] for parameter in group]) for tensor, group in groups]

    def _places(self) -> dict[str, tuple[Tensor, int, int, int]]:
        """Where this rank's part of each parameter lies, if it has one: (tensor, offset in it, start in the
        tensor rank's flattened share, length)."""
        zero, found = self.deepspeed.optimizer, {}
        for tensor, names in self._tensors():
            for name in names:
                parameter: Any = self.parameters[name]
                if self.stage == 3:  # each is cut into equal parts over the data ranks, the last one padded
                    _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
                    start = size * self.ranks.data_rank
                    length = max(0, min(size, parameter.ds_numel - start))
                elif self.stage == 0:
                    offset, start, length = 0, 0, tensor.numel()
                elif parameter._hp_mapping is None:  # another data rank's
                    continue
                else:  # the groups are cut into equal parts over the data ranks
                    mapping = parameter._hp_mapping
                    offset, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                    start = mapping.lp_fragment_address.start
                if length:
                    found[name] = tensor, offset, start, length
        return found

    def _lay_out(self, optimizer: WholeOptimizer) -> None:
        """Tells the optimizer what lies where, and whom it shares the tensors with."""
        ranks, tensors = self.ranks, self._tensors()
        mine = [
            [
                Segment(index, start, offset, length)
                for index, name in enumerate(names)
                if name in self.places
                for _, offset, start, length in [self.places[name]]
            ]
            for _, names in tensors
        ]
        # Without ZeRO the data ranks hold the same; tensor ranks are neighbours.
        first = ranks.rank - ranks.tensor_rank
        members = range(ranks.world) if self.stage else range(first, first + ranks.tensor)
        group = None if self.stage else ranks.tensor_group
        everyone = ranks.gather(mine) if isinstance(optimizer, Muon) else None
        for number, (tensor, names) in enumerate(tensors):
            parameters = []
            for name in names:
                shape, dim = self._global_shape(name), tensor_parallel_dimension(name)
                if dim is not None:
                    shape[dim] //= ranks.tensor
                parameters.append(Parameter(name, tuple(shape), dim, ranks.tensor))
            segments = [() for _ in members] if everyone is None else [everyone[r][number] for r in members]
            segments[members.index(ranks.rank)] = mine[number]
            layout = Layout(
                parameters=tuple(parameters),
                segments=tuple(tuple(part) for part in segments),
                tensor_ranks=tuple(member % ranks.tensor for member in members),
                rank=members.index(ranks.rank),
                group=group,
            )
            optimizer.lay_out(tensor, layout)

    def _global_shape(self, name: str) -> list[int]:
        parameter: Any = self.parameters[name]
        shape = list(parameter.ds_shape if self.stage == 3 else parameter.shape)
        dim = tensor_parallel_dimension(name)
        if dim is not None:
            shape[dim] *= self.ranks.tensor
        return shape

    # ---------------------------------------------------------------------------------- checkpoints

    def save(self, final: Path, facts: dict[str, Any], tokenizer: Path) -> None:
        """Writes a checkpoint `final`, all ranks together. Raises UserError when any rank cannot."""
        ranks = self.ranks
        partial = partial_folder(final)
        failure: str | None = None
        entry: dict[str, Any] = {}
        if ranks.rank == 0:
            failure = _attempt(lambda: _make_folder(final, tokenizer))
        ranks.barrier()
        if failure is None:
            mine = [
                piece
                for piece in self.pieces()
                if (self.stage or ranks.data_rank == 0)  # without ZeRO the data ranks hold the same
                and (ranks.tensor_rank == 0 or tensor_parallel_dimension(piece.name) is not None)
            ]

            def write() -> None:
                name = shard_name(ranks.tensor_rank, ranks.data_rank)
                entry.update(write_shard(partial, name, mine))
                entry.update(tensor_rank=ranks.tensor_rank, data_rank=ranks.data_rank)

            failure = _attempt(write)
        reports: list[Any] = ranks.gather((failure, entry))
        failure = next((found for found, _ in reports if found), None)
        if failure is None and ranks.rank == 0:
            table = {
                "format": FORMAT,
                "has_moments": True,
                **facts,
                "model": self.config.model.model_dump(),
                "vocab_size": self.vocab_size,
                "config": self.config.model_dump(),
                "topology": {"tensor": ranks.tensor, "data": ranks.data, "zero_stage": self.stage},
                "parameters": {
                    name: {
                        "shape": self._global_shape(name),
                        "tensor_parallel_dimension": tensor_parallel_dimension(name),
                        "states": self._states(name),
                    }
                    for name in self.parameters
                },
                "files": [found for _, found in reports],
            }
            failure = _attempt(lambda: commit(partial, final, table))
        failure = ranks.broadcast(failure)
        if failure:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"cannot write the checkpoint {final}: {failure}; the ones before it are whole")


def _attempt(work: Callable[[], None]) -> str | None:
    """Does the work; an operating system's refusal comes back in words, so that all ranks can agree."""
    try:
        work()
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return None


def _make_folder(final: Path, tokenizer: Path) -> None:
    shutil.copyfile(tokenizer, fresh_folder(final) / tokenizer.name)
