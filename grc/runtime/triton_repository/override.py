"""--set MODEL.FIELD=VALUE: fields of config.pbtxt under Triton's own names, with values as protobuf reads them from JSON."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

from grc.errors import ArtifactError

Step = tuple[str, str]  # a field, and which of its entries: "" for the field as a whole

STEP = re.compile(r"(\w+)(?:\[([^\]]+)\])?(?:\.(?=\w)|$)")
EVERY = "*"
FLAGS = {
    "name": "--name and --prefix set",
    "platform": "--backend sets",
    "backend": "--backend sets",
    "max_batch_size": "--max-batch sets",
    "ensemble_scheduling": "--layout sets",
}
# What Triton refuses in an ensemble: it has no instances, and its requests wait for its steps.
OF_STEPS = ("instance_group", "dynamic_batching", "sequence_batching", "model_warmup", "optimization")


def override(configs: Mapping[str, Any], texts: Iterable[str]) -> None:
    """Change configurations, by their models' names. A message or a map is merged with what is there, a list is replaced, and
    null takes a field away.

    Raises ArtifactError for a text of another form, an unknown model or field, and a value of a wrong type.
    """
    for text in texts:
        path, equals, value = text.partition("=")
        model = max((name for name in (EVERY, *configs) if path.startswith(f"{name}.")), key=len, default="")
        if not equals or "." not in path:
            raise ArtifactError(f"--set {text} is not MODEL.FIELD=VALUE", "such as '*.response_cache.enable=true'")
        if not model:
            raise unknown(text, "the repository", "model", path.partition(".")[0], configs)
        steps = steps_of(text, path.removeprefix(f"{model}."))
        field = steps[0][0]
        if field in FLAGS:
            raise ArtifactError(f"--set {text}: {field} is what {FLAGS[field]}", "set it by the flag")
        for name in configs if model == EVERY else [model]:
            if configs[name].platform != "ensemble" or field not in OF_STEPS:
                assign(text, configs[name], steps, value_of(value))
            elif model != EVERY:
                raise ArtifactError(f"--set {text}: an ensemble has no {field}", "set it for the models of its steps")


def steps_of(text: str, path: str) -> list[Step]:
    steps = STEP.findall(path)
    if not steps or STEP.sub("", path):
        raise ArtifactError(
            f"--set {text}: {path!r} names no field",
            "join fields by dots, and name entries in [], as instance_group[0]",
        )
    return steps


def value_of(text: str) -> Any:
    """JSON, or the text itself: an enum's names and other words need no quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def assign(text: str, message: Any, steps: Sequence[Step], value: Any) -> None:
    """Put a value into a field of a message, or of one inside it."""
    (name, key), rest = steps[0], steps[1:]
    fields = message.DESCRIPTOR.fields_by_name
    if name not in fields:
        raise unknown(text, message.DESCRIPTOR.name, "field", name, fields)
    field, held = fields[name], getattr(message, name)
    mapped, several = isinstance(held, MutableMapping), isinstance(held, (MutableMapping, MutableSequence))
    kind = field.message_type.fields_by_name["value"].message_type if mapped else field.message_type
    if (rest and several and not key) or (key and not several):
        raise wrong(text, f"{name} is a list: name an entry, as {name}[0]" if several else f"{name} is no list", field)
    if mapped and not key and isinstance(value, dict):
        for entry, given in value.items():
            assign(text, message, [(name, entry)], given)
    elif kind is None or (several and not key) or (value is None and not rest):
        if rest or (key and not mapped):
            raise wrong(text, f"{name} has no fields" if rest else f"{name} is set as a whole", field)
        put(text, message, field, {key: value} if key else value)
    else:
        child = entry_of(text, held, field, key) if several else held
        child.SetInParent()
        if rest:
            assign(text, child, rest, value)
        elif isinstance(value, dict):
            for part, given in value.items():
                assign(text, child, [(part, "")], given)
        else:
            raise wrong(text, f"{name} is a message, and {json.dumps(value)} is none", field)


def entry_of(text: str, entries: Any, field: Any, key: str) -> Any:
    """A message in a map or a list; one that is not there yet is made, in a list behind the last."""
    named = isinstance(entries, MutableMapping)
    if named and field.message_type.fields_by_name["key"].type == field.TYPE_STRING:
        return entries[key]
    if not key.isdecimal() or (not named and int(key) > len(entries)):
        limit = "" if named else f" to {len(entries)}"
        raise wrong(text, f"entries of {field.name} are numbered from 0{limit}", field)
    if named:
        return entries[int(key)]
    return entries[int(key)] if int(key) < len(entries) else entries.add()


def put(text: str, message: Any, field: Any, value: Any) -> None:
    """Set a field as a whole, but a map by its keys."""
    from google.protobuf import json_format

    if field.type == field.TYPE_STRING and isinstance(value, (int, float)):
        value = json.dumps(value)
    if not isinstance(value, dict):
        message.ClearField(field.name)
    try:
        json_format.ParseDict({field.name: value}, message)
    except json_format.ParseError as error:
        raise wrong(text, str(error).splitlines()[0].rstrip("."), field) from error


def unknown(text: str, owner: str, kind: str, name: str, known: Iterable[str]) -> ArtifactError:
    nearest = difflib.get_close_matches(name, list(known), 1, 0.0)
    hint = f"the nearest is {nearest[0]}" if nearest else f"{owner} has none"
    return ArtifactError(f"--set {text}: {owner} has no {kind} {name}", hint)


def wrong(text: str, reason: str, field: Any) -> ArtifactError:
    if field.enum_type is not None:
        takes = "one of " + ", ".join(value.name for value in field.enum_type.values)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        takes = "JSON by its keys"
    elif field.message_type is not None:
        takes = "JSON of " + ", ".join(field.message_type.fields_by_name)
    else:
        takes = next(
            name[5:].lower() for name in dir(field) if name[:5] == "TYPE_" and getattr(field, name) == field.type
        )
    return ArtifactError(f"--set {text}: {reason}", f"{field.name} takes {takes}")
