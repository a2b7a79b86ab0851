"""What is wrong with a configuration's values, in the words of who wrote them: which key, which value, what is legal. Pydantic finds it; its schema says what
is legal."""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from shards import credentials

NAMED = 6  # of unknown keys, before the rest are counted
LIMITS = {
    "minimum": "at least {}", "exclusiveMinimum": "more than {}", "maximum": "at most {}", "exclusiveMaximum": "less than {}",
    "multipleOf": "a multiple of {}", "pattern": "of the form {}", "minLength": "of {} characters or more",
}  # fmt: skip
KINDS = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text", "null": "null"}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """All that `error` holds against a `model`, a line for each key; unknown keys of a section are one line."""
    schema, said, unknown = model.model_json_schema(), {}, {}
    for item in error.errors():
        where, node = _at(schema, item["loc"])
        if item["type"] in ("extra_forbidden", "invalid_key"):  # the second is a number, or true
            unknown.setdefault(where, (node, []))[1].append(str(item["loc"][-1]))
        elif item["type"] == "missing" and isinstance(item["loc"][-1], str):
            said[where] = f"{_dotted(where)}: needs a value"
        else:
            said.setdefault(where, _wrong(schema, item))
    lines = list(said.values())
    for where, (node, keys) in unknown.items():
        names = ", ".join(_dotted((*where, key)) for key in keys[:NAMED]) + (f" and {len(keys) - NAMED} more" if len(keys) > NAMED else "")
        lines.append(f"{names}: no such key{'s' if len(keys) > 1 else ''}. Legal here: {', '.join(sorted(node['properties']))}")
    return "\n".join(lines)


def _wrong(schema: dict, item: dict) -> str:
    """A value that is there and cannot be: its key, itself, what is legal, and where its form is wrong how to write it."""
    loc, ours = item["loc"], item["type"] in ("value_error", "assertion_error")  # ours say what is legal
    if item["type"] == "missing":  # an entry of a list of so many
        loc = loc[:-1]
    where, node = _at(schema, loc)
    told = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ") if ours else f"legal is {_legal(schema, node)}"
    if not where:
        return told
    key, value = _dotted(where), _word(item["input"])
    if not ours and "properties" in node:
        return f"{key} = {value}: it is a section, whose keys are {', '.join(sorted(node['properties']))}: write {key}.KEY=VALUE"
    if not ours and node.get("type") == "array" and "type" in node.get("items", {}) and isinstance(item["input"], (str, int, float)):
        told += f": write {key}=[{item['input']}]"
    return f"{key} = {credentials.without_keys(value)}: {credentials.without_keys(told)}"


def _at(schema: dict, loc: tuple) -> tuple[tuple, dict]:
    """As much of `loc` as names something in `schema`, and what that is; behind it pydantic names the branches it tried, or a key that is unknown."""
    node, followed = _resolved(schema, schema), ()
    for part in loc:
        if isinstance(part, int):
            entries = node.get("prefixItems", [])
            inner = entries[part] if part < len(entries) else node.get("items")
        else:
            inner = node.get("properties", {}).get(part) or node.get("additionalProperties")
        if not isinstance(inner, dict):
            break
        node, followed = _resolved(schema, inner), (*followed, part)
    return followed, node


def _resolved(schema: dict, node: dict) -> dict:
    """`node`, or what it refers to; of a section or a list that may be null, the section or the list."""
    if "$ref" in node:
        return schema["$defs"][node["$ref"].rpartition("/")[2]]
    branches = [_resolved(schema, branch) for branch in node.get("anyOf", ()) if branch.get("type") != "null"]
    return branches[0] if len(branches) == 1 and branches[0].get("type") in ("object", "array") else node


def _legal(schema: dict, node: dict) -> str:
    if "anyOf" in node:
        return " or ".join(_legal(schema, _resolved(schema, branch)) for branch in node["anyOf"])
    if "enum" in node or "const" in node:
        return ", ".join(_word(value).strip("'") for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        entries = node.get("prefixItems", [])
        each = _legal(schema, _resolved(schema, node.get("items") or (entries or [{}])[0]))
        return f"a list of {len(entries)} entries, each {each}" if entries else f"a list, each entry {each}"
    limits = [words.format(node[name]) for name, words in LIMITS.items() if name in node]
    return ", ".join([KINDS.get(node.get("type"), "a section, keys with their values"), *limits])


def _word(value: object) -> str:
    """A value as YAML has it, in short."""
    said = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    return said if len(said) <= 80 else f"{said[:77]}…"


def _dotted(where: tuple) -> str:
    return ".".join(map(str, where)) or "configuration"
