"""What a file says beside its graph: metadata, versions, functions, and which passes made it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import onnx

from onnxcompress.model.provenance import PROVENANCE, parse_provenance
from onnxcompress.version import __version__

Derived = TypeVar("Derived")


class FileMetadata:
    """The part of a model that is no graph."""

    _envelope: onnx.ModelProto
    """The file without nodes and initializers."""
    _parsed: dict[tuple[str, str | None], Any]
    """Parsed metadata, by key and value; copies of a model share it."""
    input_digest: Callable[[], str] | None
    """Computes the digest of what was read; None once `save` would write anything else."""

    @property
    def opset(self) -> int:
        """Version of the default operator set; 1 where the file names none."""
        versions = [o.version for o in self._envelope.opset_import if o.domain in ("", "ai.onnx")]
        return max(versions, default=1)

    @property
    def ir_version(self) -> int:
        """Version of ONNX's intermediate representation."""
        return int(self._envelope.ir_version)

    @property
    def sparse_names(self) -> set[str]:
        """Names of the sparse initializers."""
        return {sparse.values.name for sparse in self._envelope.graph.sparse_initializer}

    @property
    def functions(self) -> Sequence[onnx.FunctionProto]:
        """The model's local functions, as in the file."""
        return list(self._envelope.functions)

    @property
    def producer(self) -> str:
        """Name and version of the tool that exported the model."""
        return f"{self._envelope.producer_name} {self._envelope.producer_version}".strip()

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the model's metadata_props."""
        return {p.key: p.value for p in self._envelope.metadata_props}

    def set_metadata(self, key: str, value: str | None) -> None:
        """Set or remove an entry of metadata_props.

        Args:
            key: The entry's key.
            value: Its value; None removes the entry.
        """
        if self.metadata.get(key) == value:
            return
        self.input_digest = None  # `save` would no longer write what was read
        entries = self._envelope.metadata_props
        for at in [i for i, p in enumerate(entries) if p.key == key][::-1]:
            if value is None:
                del entries[at]
            else:
                entries[at].value = value
                return
        if value is not None:
            entries.add(key=key, value=value)

    def parsed_metadata(self, key: str, parse: Callable[[str | None], Derived]) -> Derived:
        """Parse an entry of metadata_props, each value once for the model and its copies.

        Args:
            key: The entry's key.
            parse: A function of its value, None where there is none; always the same for a key.

        Returns:
            What it returned; all callers share the object, so it must not be changed.
        """
        value = self.metadata.get(key)
        if (key, value) not in self._parsed:
            self._parsed[key, value] = parse(value)
        result: Derived = self._parsed[key, value]
        return result

    def provenance(self) -> list[dict[str, Any]]:
        """Read from the metadata which passes made this model.

        Returns:
            Entries with `pass`, `options`, `version`, `input_sha256` and perhaps `inputs`, oldest first.
        """
        return parse_provenance(self.metadata.get(PROVENANCE, "[]"))

    def add_provenance(
        self, name: str, options: dict[str, Any], digest: str, inputs: Any | None = None
    ) -> None:
        """Append an entry to the provenance in the metadata.

        Args:
            name: The pass.
            options: Its options, as JSON.
            digest: SHA-256 of the model that it was given, in hexadecimal.
            inputs: Source, count and seed of the inputs that it learned from, as JSON.
        """
        entry = {"pass": name, "options": options, "version": __version__, "input_sha256": digest}
        if inputs is not None:
            entry["inputs"] = inputs
        self.set_metadata(PROVENANCE, json.dumps([*self.provenance(), entry]))
