"""TRL's trainers that train on what they generate, GRPO and RLOO: ranks of a group sample the same completions."""

from typing import Any

from torch.utils.data import Sampler
from transformers import set_seed

from sp_attention.errors import UnsupportedError
from sp_attention.integrations.trainer import InGroups

# What generates, or shows, by ways of its own.
_REFUSED = ("use_vllm", "use_transformers_continuous_batching", "log_completions")


class GeneratesInGroups(InGroups):
    """The ranks of a group generate the same completions together, and train on them together."""

    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._handle().peers is not None:
            self._refuse()
        # TRL seeds each process on its own.
        set_seed(self.args.seed + self._handle().data_parallel_rank)

    def _refuse(self) -> None:
        refused = [name for name in _REFUSED if getattr(self.args, name, False)]
        if refused:
            raise UnsupportedError(
                f"{', '.join(refused)} is not covered under sequence parallelism: leave it out, and completions come "
                "from the model's own generate()"
            )
        if any(each.__name__ == "RLOOTrainer" for each in type(self).__mro__) and self.args.beta:
            raise UnsupportedError(
                "RLOOTrainer gathers its KL penalty from each process, and not from each group: set beta=0.0, or use "
                "GRPOTrainer"
            )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[Any] | None:
        sampler: Any = super()._get_train_sampler(*args, **kwargs)
        completions = self.args.generation_batch_size // self._group_size()
        _require_whole_prompts(completions, self.args.num_generations, "per_device_train_batch_size")
        sampler.batch_size = completions // self.args.num_generations
        made: Sampler[Any] | None = sampler
        return made

    def _get_eval_sampler(self, *args: Any, **kwargs: Any) -> Sampler[Any] | None:
        completions = self.args.eval_batch_size * self._handle().data_parallel_size
        generations = self.args.num_generations_eval or self.args.num_generations
        _require_whole_prompts(completions, generations, "per_device_eval_batch_size")
        sampler: Sampler[Any] | None = super()._get_eval_sampler(*args, **kwargs)
        return sampler

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._generating():
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        # Of all processes; they are gathered without the accelerator.
        rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        return self.accelerator.once_for_each_group(rewards)

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        with self.accelerator.counting_groups():
            return super()._generate_and_score_completions(*args, **kwargs)  # type: ignore[misc]


def _require_whole_prompts(completions: int, generations: int, name: str) -> None:
    if completions % generations:
        raise ValueError(
            f"all groups together generate {completions} completions at a time, and each prompt has {generations}: "
            f"make {name} larger, since the ranks of a group share one batch"
        )
