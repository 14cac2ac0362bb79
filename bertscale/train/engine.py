"""The model and optimizer of a run, sharded by DeepSpeed, and how each rank's part is read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from bertscale.config import FinetuneConfig, ModelConfig, PretrainConfig, TrainConfig, UserError
from bertscale.model.layers import Layers
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.optim.groups import is_matrix, make_optimizer
from bertscale.optim.layout import Fragment, Layout, Parameter
from bertscale.optim.optimizers import Muon, WholeOptimizer, first_moments
from bertscale.train.checkpoint import Checkpoint, StateFragment
from bertscale.train.checkpoint_table import AVERAGE, STATES
from bertscale.train.clipping import set_clipping, whole_norm
from bertscale.train.parallel import Ranks, take_share, tensor_parallel_dimension
from bertscale.train.zero import Zero

# (name, state, start, length) -> those values of this tensor rank's flattened share of the parameter.
ReadPart = Callable[[str, str, int, int], Tensor]
Scale = Callable[[str], float]  # of the learning rate of a parameter, by its name; 0: it is not trained


def _graph_tokens(config: PretrainConfig | FinetuneConfig, ranks: Ranks) -> int | None:
    """The most tokens of a micro-batch, where layers are replayed as CUDA graphs; None elsewhere."""
    train, stage = config.train, config.parallel.zero_stage
    if train.compile != "graphs":
        return None
    assert isinstance(train, TrainConfig)
    if stage != 2 and train.micro_samples != train.global_batch // ranks.data:
        raise UserError(
            f"train.compile=graphs with parallel.zero_stage={stage} needs each rank's part of a step in one "
            "micro-batch, because a second one would overwrite the gradients of the first; set "
            "parallel.zero_stage=2, or train.micro_batch to the size of that part"
        )
    return train.micro_tokens or train.micro_batch * config.samples.max_length


AnyConfig = TypeVar("AnyConfig", PretrainConfig, FinetuneConfig)


class Engine(Generic[AnyConfig]):
    """The sharded model and optimizer; `start` or `resume` fills their state, `fragments` gives it out.

    `norm` and `step_applied`, float32 0-dim, are those of the last step.
    """

    def __init__(
        self,
        config: AnyConfig,
        sizes: ModelConfig,
        vocab_size: int,
        ranks: Ranks,
        dtype: torch.dtype,
        make_model: Callable[[Layers], nn.Module],
        scale: Scale | None = None,
    ) -> None:
        """Builds the model, each rank its own part; weights are undefined until `start` or `resume`.

        `make_model` makes it of the layers that it is given, with the attributes `encoder` and `parallel`
        (those layers). `sizes` is the shape of its encoder. Parameters of `scale` 0 are not trained.
        """
        self.config: AnyConfig = config
        self.ranks, self.stage = ranks, config.parallel.zero_stage
        self.sizes, self.vocab_size = sizes, vocab_size
        self.norm, self.step_applied = torch.zeros(()), torch.ones(())
        self.frozen: dict[
            str, nn.Parameter
        ] = {}  # parameters that are not trained: whole shares, on each rank

        # Called inside of DeepSpeed's zero.Init, which under stage 3 shards each weight once it is made: no
        # rank ever holds the whole model.
        def build() -> nn.Module:
            made = make_model(ranks.layers(config.parallel.sequence))
            self.model: Any = made
            for name, parameter in made.named_parameters():
                if scale is not None and scale(name) == 0:
                    parameter.requires_grad = False
                    self.frozen[name] = parameter
            return made

        def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
            if config.compiles(ranks.device.type):
                self.model.encoder.compile_layers(
                    fused=dtype != torch.float32 and ranks.device.type == "cuda",
                    graph_tokens=_graph_tokens(config, ranks),
                )
            return make_optimizer(model, config.optimizer, sizes, dtype, scale)

        self.zero = Zero(config, ranks, dtype, build, optimizer_of)
        self.parameters, self.optimizer = self.zero.parameters, self.zero.optimizer
        self.decay = config.train.average if isinstance(config, PretrainConfig) else 0.0
        kept = [tensor for tensor, _ in self.zero.tensors] if self.decay else []
        # Of each tensor that the optimizer updates, the moving average.
        self.averages = {tensor: torch.empty_like(tensor, requires_grad=False) for tensor in kept}
        if isinstance(self.optimizer, WholeOptimizer):
            self._lay_out(self.optimizer)

    # ------------------------------------------------------------------------------------- training

    def __call__(self, batch: Any) -> Any:
        """Runs the forward pass of a micro-batch that is on the device; returns what the model does."""
        return self.zero.engine(batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of `loss`, which nothing here scales (see `train_step`).

        `last`: of the micro-batches of this global step.
        """
        self.zero.backward(loss, last=last)

    def step(self, learning_rate: float) -> None:
        """Ends a micro-batch; at the end of the global step: all-reduce, clip, update.

        `step_applied` is then 1, or 0 if the gradient was not finite and has changed nothing: float32, 0-dim.
        """
        zero, ends = self.zero, self.zero.at_end_of_step()
        if ends and not zero.clips:
            self.norm = whole_norm(zero.gradients(), self.ranks, sharded=self.stage > 0)
            # The gradients are reduced and not yet used; the factor goes into the fused update itself.
            largest = self.config.optimizer.gradient_clipping
            self.step_applied = set_clipping(self.optimizer, self.norm, largest)
        zero.step(learning_rate)
        if ends and zero.clips:
            applied = float(zero.engine.was_step_applied())  # where DeepSpeed clips, it has waited already
            self.step_applied = torch.full((), applied, device=self.ranks.device)
        if ends and self.decay:
            self._average_weights()

    def gradient_norm(self) -> float:
        """Norm of the whole gradient of the last step, before clipping. Waits for the device."""
        return float(self.zero.engine.get_global_grad_norm() if self.zero.clips else self.norm)

    def num_parameters(self) -> int:
        """Number of trainable values of the whole model."""
        return sum(torch.Size(self._global_shape(name)).numel() for name in self.parameters)

    # ---------------------------------------------------------------------------- average of weights

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Moves the averages towards the weights; a step that was skipped does not count. No wait for the
        device."""
        share = (1 - self.decay) * self.step_applied
        weights = [tensor.data for tensor in self.averages]
        torch._foreach_lerp_([*self.averages.values()], weights, [share] * len(weights))

    def begin_average(self) -> None:
        """Lets the average of the weights begin from what they are."""
        for tensor, average in self.averages.items():
            average.copy_(tensor.data)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model computes with the average of the weights; afterwards these are as they were, bit
        for bit. All ranks must enter."""
        self._swap()
        yield
        self._swap()  # not after an error of one rank: the others would not come to this collective

    def _swap(self) -> None:
        for tensor, average in self.averages.items():
            held = tensor.data.clone()
            tensor.data.copy_(average)
            average.copy_(held)
        self.zero.refresh_weights()

    # ---------------------------------------------------------------------------------------- state

    def start(self, seed: int) -> None:
        """Gives every parameter of a pretraining its first value, `model.initial_value`."""
        first = partial(initial_value, config=self.sizes, vocab_size=self.vocab_size, seed=seed)
        self.start_from(lambda name, shape: first(name, shape))

    def start_from(self, first_value: Callable[[str, list[int]], Tensor]) -> None:
        """Gives every parameter the value of `first_value(name, shape)`, whole tensors, and forgets
        moments."""
        self.optimizer.state.clear()
        self._fill(
            self._parts_of(lambda name, state: first_value(name, self._global_shape(name))), ("weight",)
        )
        self.begin_average()
        for name, parameter in self.frozen.items():
            share = take_share(
                first_value(name, self._whole(name, list(parameter.shape))),
                name,
                self.ranks.tensor,
                self.ranks.tensor_rank,
            )
            parameter.data.copy_(share)

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Takes over the weights of a checkpoint of any topology, and nothing else."""
        self._fill(self._parts_in(checkpoint), ("weight",))

    def resume(self, checkpoint: Checkpoint, begin: int = 0) -> None:
        """Takes over weights, moments, step and average of a checkpoint of any topology; its steps until
        `begin` are those of earlier runs. An average that it lacks begins from the weights.

        Raises UserError where it is of another model, or lacks a moment that the optimizer needs.
        """
        missing = set(self.parameters) ^ set(checkpoint.parameters)
        if missing:
            raise UserError(f"the checkpoint {checkpoint.folder} is of another model: {min(missing)} differs")
        for name, entry in checkpoint.parameters.items():
            if entry["shape"] != self._global_shape(name):
                raise UserError(
                    f"the checkpoint {checkpoint.folder} is of another model: {name} is {entry['shape']}, "
                    f"the config makes it {self._global_shape(name)}"
                )
            for state in self._moments(name) if checkpoint.has_moments else ():
                if state not in entry.get("states", STATES):
                    raise UserError(
                        f"the checkpoint {checkpoint.folder} has no {state} of {name}, which "
                        f"optimizer.name={self.config.optimizer.name} needs; resume with optimizer.name=muon"
                    )
        self._fill(self._parts_in(checkpoint), STATES if checkpoint.has_moments else ("weight",))
        if self.decay and checkpoint.has_average:
            self._fill(self._parts_in(checkpoint), (AVERAGE,))
        else:
            self.begin_average()
        for state in self.optimizer.state.values():  # for the bias correction
            state["step"].fill_(checkpoint.updates - begin)

    def fragments(self) -> list[StateFragment]:
        """This rank's part of the state, as views: training continues from what is written into them."""
        states = self.optimizer.state
        for tensor, names in self.zero.tensors:  # torch makes moments at the first step; they are needed now
            first_moments(states[tensor], tensor, second="exp_avg_sq" in self._moments(names[0]))
        fragments = []
        for name, (tensor, offset, start, length) in self.zero.addresses.items():
            values: dict[str, Any] = {
                "weight": tensor.data,
                **states[tensor],
                AVERAGE: self.averages.get(tensor),
            }
            views = {key: values[key].view(-1).narrow(0, offset, length) for key in self._states(name)}
            fragments.append(StateFragment(name, start, views))
        return fragments

    def fragments_to_save(self) -> list[StateFragment]:
        """The fragments that this rank writes into a checkpoint, so that each is written once."""
        if self.stage == 0 and self.ranks.data_rank:  # without ZeRO the data ranks hold the same
            return []
        return [
            fragment
            for fragment in self.fragments()
            if self.ranks.tensor_rank == 0 or tensor_parallel_dimension(fragment.name) is not None
        ]

    def table(self) -> dict[str, Any]:
        """The entries of a checkpoint's table about the model, the topology and the parameters."""
        return {
            "model": self.sizes.model_dump(),
            "vocab_size": self.vocab_size,
            "config": self.config.model_dump(),
            "topology": {"tensor": self.ranks.tensor, "data": self.ranks.data, "zero_stage": self.stage},
            "parameters": {
                name: {
                    "shape": self._global_shape(name),
                    "tensor_parallel_dimension": tensor_parallel_dimension(name),
                    "states": self._states(name),
                }
                for name in self.parameters
            },
        }

    def _states(self, name: str) -> tuple[str, ...]:
        """What is kept of the parameter: weight, moments, and maybe the average."""
        return (*self._moments(name), AVERAGE) if self.decay else self._moments(name)

    def _moments(self, name: str) -> tuple[str, ...]:
        """The states that the optimizer keeps of the parameter, its weight included."""
        muon = self.config.optimizer.name == "muon" and is_matrix(name)
        return STATES[:2] if muon else STATES

    def _parts_of(self, read: Callable[[str, str], Tensor]) -> ReadPart:
        """Reads parts of the whole tensors `read(name, state)`."""

        def part(name: str, state: str, start: int, length: int) -> Tensor:
            whole = read(name, state)
            assert list(whole.shape) == self._global_shape(name), name  # what follows sees no shapes
            share = take_share(whole, name, self.ranks.tensor, self.ranks.tensor_rank)
            return share.flatten()[start : start + length]

        return part

    def _parts_in(self, checkpoint: Checkpoint) -> ReadPart:
        """Reads parts of a checkpoint's tensors, of shares that are cut alike without the rest of them."""
        of_whole = self._parts_of(checkpoint.tensor)

        def part(name: str, state: str, start: int, length: int) -> Tensor:
            sharded = tensor_parallel_dimension(name) is not None
            if checkpoint.degree(name) != (self.ranks.tensor if sharded else 1):
                return of_whole(name, state, start, length)
            assert checkpoint.parameters[name]["shape"] == self._global_shape(name), name
            rank = self.ranks.tensor_rank if sharded else 0
            return checkpoint.part(name, state, rank, start, length)

        return part

    def _fill(self, read: ReadPart, states: tuple[str, ...]) -> None:
        """Copies `read(name, state, start, length)`, this rank's part, into each of the states.

        One tensor at a time, on the CPU: the memory of a rank holds no more than its largest parameter.
        """
        fragments = {fragment.name: fragment for fragment in self.fragments()}
        for name in self.parameters:
            for state in states:
                if state not in self._states(name) or name not in fragments:
                    continue
                target = fragments[name].states[state]
                target.copy_(read(name, state, fragments[name].start, target.numel()))
        self.zero.refresh_weights()

    def _lay_out(self, optimizer: WholeOptimizer) -> None:
        """Tells the optimizer what lies where in its tensors, and which ranks hold the other parts."""
        ranks, tensors = self.ranks, self.zero.tensors
        mine = [
            [
                Fragment(index, start, offset, length)
                for index, name in enumerate(names)
                if name in self.zero.addresses
                for _, offset, start, length in [self.zero.addresses[name]]
            ]
            for _, names in tensors
        ]
        # Without ZeRO the data ranks hold the same, and each replica sums over its tensor ranks, which have
        # neighbouring numbers; with it the parts are on all ranks.
        first = ranks.rank - ranks.tensor_rank
        members = range(ranks.world) if self.stage else range(first, first + ranks.tensor)
        group = None if self.stage else ranks.tensor_group
        everyone = ranks.gather(mine) if isinstance(optimizer, Muon) else None  # whose matrices travel
        for number, (tensor, names) in enumerate(tensors):
            parameters = []
            for name in names:
                shape, dim = self.zero.share_shape(name), tensor_parallel_dimension(name)
                parameters.append(Parameter(name, tuple(shape), dim, ranks.tensor))
            fragments = [() for _ in members] if everyone is None else [everyone[r][number] for r in members]
            fragments[members.index(ranks.rank)] = mine[number]
            layout = Layout(
                parameters=tuple(parameters),
                fragments=tuple(tuple(part) for part in fragments),
                tensor_ranks=tuple(member % ranks.tensor for member in members),
                rank=members.index(ranks.rank),
                group=group,
            )
            optimizer.lay_out(tensor, layout)

    def _global_shape(self, name: str) -> list[int]:
        """The shape of the whole parameter, all tensor-parallel shares together."""
        return self._whole(name, self.zero.share_shape(name))

    def _whole(self, name: str, shape: list[int]) -> list[int]:
        dim = tensor_parallel_dimension(name)
        if dim is not None:
            shape[dim] *= self.ranks.tensor
        return shape


def pretraining_engine(
    config: PretrainConfig, vocab_size: int, ranks: Ranks, dtype: torch.dtype
) -> Engine[PretrainConfig]:
    """The engine of a pretraining's encoder and heads."""

    def make_model(layers: Layers) -> nn.Module:
        return PretrainingModel(config.model, vocab_size, layers, config.train.activation_checkpointing)

    return Engine(config, config.model, vocab_size, ranks, dtype, make_model)
