"""What stands in the place of a tensor, and is not to be taken for one: every use of it is an error that says why."""

from typing import Any, NoReturn


class NoTensor:
    """Whatever is asked of it, as if it were a tensor, is refused by `_refuse`, which raises an AttributeError too."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own, asked of what is copied or pickled.
            raise AttributeError(name)
        self._refuse()

    def _refused(self, *_: Any) -> NoReturn:
        self._refuse()

    def __eq__(self, other: object) -> Any:
        self._refuse()

    __hash__ = object.__hash__
    __getitem__ = __setitem__ = __len__ = __iter__ = __array__ = __float__ = __int__ = __bool__ = _refused
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refused
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __pow__ = __rpow__ = _refused
    __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = _refused
