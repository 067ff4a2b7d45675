"""The tensors of a checkpoint that its architecture needs, checked by name, shape and dtype before any is read."""

from collections.abc import Mapping

from flap_stream.errors import CorruptCheckpoint, UnsupportedModel
from flap_stream.model.architecture import further_layers, require_sizes
from flap_stream.model.checkpoint import Checkpoint
from flap_stream.model.families import family_of
from flap_stream.model.safetensors_format import FORWARD_DTYPES, TensorEntry
from flap_stream.model.skeleton import Skeleton


class CheckedTensors:
    """The tensors of a causal language model in a checkpoint.

    skeleton: the model without weights. shapes: sizes of every decoder layer, from its tensors.
    layer_entries: the tensors of each decoder layer by relative name. outer_entries: see `OuterModel.tensors`.
    embedding_entry: the embedding; input_entry: the table of the layers' own inputs, if they have any.
    head_entries: the head's, by relative name, its weight the embedding if it is tied.
    Raises UnsupportedModel, InvalidModel or CorruptCheckpoint if any tensor that a forward needs is missing or has
    another shape or dtype than the architecture asks for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.family = family_of(checkpoint.config, checkpoint.source)
        self._require_plausible_config()
        self.skeleton = Skeleton(checkpoint.config, checkpoint.source)
        count = len(self.skeleton.layers)
        self.layer_entries = [
            self._entries_of(self.family.layer_prefix(i), self.skeleton.layer_tensors(i)) for i in range(count)
        ]
        self.outer_entries = self._entries_of(f"{self.family.base_path}.", self.skeleton.outer.tensors())
        table = self.skeleton.outer.input_embedding()
        self.input_entry = None if table is None else self._table(*table)
        head_tensors = {} if self.skeleton.tied else self.skeleton.outer.head_tensors()
        own = self._entries_of(f"{self.family.head_path}.", head_tensors)
        self.head_entries = own or {"weight": self.embedding_entry}
        self.shapes = [self.skeleton.layer_shape(i) for i in range(count)]
        self.vocab_size, self.hidden_size = self.embedding_entry.shape

    def _require_plausible_config(self) -> None:
        """Compare config.json with the tensors before anything is built from it."""
        config, where = self.checkpoint.config, self.checkpoint.source
        require_sizes(config, where)
        layers = config["num_hidden_layers"]
        found = {self.family.layer_of(name) for name in self.checkpoint.tensors} - {None, *further_layers(config)}
        if len(found) != layers:
            raise CorruptCheckpoint(
                f"{where}/config.json has num_hidden_layers {layers}, but there are tensors of {len(found)} layers; "
                "the checkpoint is incomplete or its config.json is another model's"
            )
        self.embedding_entry = self._table(self.family.embedding, (config["vocab_size"], config["hidden_size"]))

    def _table(self, name: str, shape: tuple[int, int]) -> TensorEntry:
        """An embedding, of which only the rows of some words are read."""
        entry = self._entry(name, shape)
        if entry.encoding is not None:
            raise UnsupportedModel(
                f"{self.checkpoint.source} has a quantised embedding, of which single rows cannot be read"
            )
        return entry

    def _entries_of(self, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
        return {name: self._entry(prefix + name, shape) for name, shape in shapes.items()}

    def _entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        entry = self.checkpoint.tensors.get(name)
        where = self.checkpoint.source
        if entry is None:
            file = self.checkpoint.misplaced.get(name)
            placed = "" if file is None else f" (its index places it in {file}, which does not hold it)"
            what = "it is a model without its head" if name == self.family.head else "the checkpoint is incomplete"
            raise CorruptCheckpoint(f"tensor {name} is missing from {where}{placed}; {what}")
        if entry.shape != shape:
            raise CorruptCheckpoint(
                f"tensor {name} of {where} has shape {list(entry.shape)}, but its config.json asks for {list(shape)}"
            )
        if entry.dtype not in FORWARD_DTYPES:
            raise UnsupportedModel(
                f"tensor {name} of {where} has dtype {entry.dtype}; pruning needs {', '.join(FORWARD_DTYPES)}"
            )
        return entry
