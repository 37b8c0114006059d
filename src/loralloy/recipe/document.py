"""A YAML text that knows where each of its fields stands, so that what is wrong can be named by line and column."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..errors import LoralloyError

At: TypeAlias = tuple[int | str, ...]
_LONGEST = 1_000_000  # characters; a recipe has a few thousand


class Problem(NamedTuple):
    """What is wrong with one field. `key`: it is the field's name that is wrong, not its value."""

    at: At
    message: str
    key: bool = False


class Document:
    """A recipe's data, and where each field of it stands.

    Attributes:
        data: what ``yaml.safe_load`` gives.
        path: the file, or None for data that did not come from one.

    Raises LoralloyError with file, line and column for text that is not YAML, keys given twice or that are not text.
    """

    def __init__(
        self, data: Any, path: Path | None = None, root: Node | None = None, moved: frozenset[str] = frozenset()
    ) -> None:
        self.data, self.path, self._root, self._moved = data, path, root, moved

    def changed(self, fields: Mapping[str, Any]) -> Document:
        """The same document with other top-level fields (None removes one); those stand nowhere in the file."""
        data = {k: v for k, v in {**self.data, **fields}.items() if v is not None}
        return Document(data, self.path, self._root, self._moved | set(fields))

    @staticmethod
    def read(path: Path, what: str = "recipe") -> Document:
        """Read a YAML file."""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise LoralloyError(f"{path}: no such {what}") from None
        except UnicodeDecodeError as error:
            raise LoralloyError(f"{path}: not a text file ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise LoralloyError(f"{path}: cannot be read ({error.strerror or error})") from None
        if len(text) > _LONGEST:
            raise LoralloyError(f"{path}: {len(text):,} characters are too many for a {what}; is it another file?")
        try:
            loader = yaml.SafeLoader(text)
            try:
                root = loader.get_single_node()
                if root is not None:
                    _check_keys(root, path)
                data = loader.construct_document(root) if root is not None else None
            finally:
                loader.dispose()
        except LoralloyError:
            raise
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            said = " ".join(part for part in (error.context, error.problem) if part)
            raise LoralloyError(f"{path}{place}: not YAML: {said}") from None
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            place = f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
            raise LoralloyError(
                f"{path}:{place}: not YAML: a character that no text has, {text[error.position]!r}"
            ) from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-45
            raise LoralloyError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        except RecursionError:
            raise LoralloyError(f"{path}: not a {what}: it is nested too deeply") from None
        return Document(data, path, root)

    def place(self, at: At, key: bool = False) -> tuple[int, int] | None:
        """Line and column (from 1) of a field's value, or of its name; of what holds it where it is not there."""
        if self._root is None or (at and at[0] in self._moved):
            return None
        node, last = self._root, self._root
        for part in at:
            found = _child(node, part)
            if found is None:
                break
            last, node = found
        else:
            if key:
                node = last
        return node.start_mark.line + 1, node.start_mark.column + 1

    def error(self, problems: Sequence[Problem]) -> LoralloyError:
        """All problems in one message, in the order of the file, with line, column and the field's path."""
        placed = sorted(((self.place(p.at, p.key) or (0, 0), p) for p in problems), key=lambda item: item[0])
        said = []
        for n, ((line, column), problem) in enumerate(placed):
            field = f"`{field_path(problem.at)}`: " if problem.at else ""
            if n == 0:
                where = f"{self.path}:{line}:{column}: " if self.path and line else f"{self.path or 'recipe'}: "
            else:
                where = f"{line}:{column}: " if line else ""
            said.append(where + field + problem.message)
        return LoralloyError("; and ".join(said))

    def wrong(self, at: At, message: str, key: bool = False) -> LoralloyError:
        return self.error([Problem(at, message, key)])


def field_path(at: At) -> str:
    """adapters[0].weight"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).lstrip(".")


def _child(node: Node, part: int | str) -> tuple[Node, Node] | None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.value == str(part):
                return key, value
    elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None


def _check_keys(root: Node, path: Path) -> None:
    """Every key is text and stands once in its mapping (YAML takes the last of two without a word)."""
    seen_nodes: set[int] = set()
    todo = [root]
    while todo:
        node = todo.pop()
        if id(node) in seen_nodes:  # an alias
            continue
        seen_nodes.add(id(node))
        if isinstance(node, SequenceNode):
            todo += node.value
        elif isinstance(node, MappingNode):
            first: dict[Hashable, int] = {}
            for key, value in node.value:
                line, column = key.start_mark.line + 1, key.start_mark.column + 1
                if key.tag != "tag:yaml.org,2002:merge":
                    if not isinstance(key, ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                        said = f"`{key.value}`" if isinstance(key, ScalarNode) else "a list or mapping"
                        raise LoralloyError(
                            f"{path}:{line}:{column}: a field's name must be text, not {said}; quote it"
                        )
                    if key.value in first:
                        raise LoralloyError(
                            f"{path}:{line}:{column}: `{key.value}` is given twice, on lines {first[key.value]} and "
                            f"{line}; keep one"
                        )
                    first[key.value] = line
                todo.append(value)
