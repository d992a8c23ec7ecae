"""What stays in its process: a model that has it cannot be pickled, and is told so."""

from typing import Any, NoReturn

from sp_attention.errors import UnsupportedError


class Unpicklable:
    """Hooks and handles of an enabled model: copies of the model keep them, and nothing pickles them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "an enabled model cannot be pickled, as by torch.save(model), since its ranks share it with process groups "
            "of their own: save model.state_dict(), or model.save_pretrained(folder), or pickle it after "
            "handle.disable()"
        )
