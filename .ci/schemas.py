"""Check structured output: every instance made for a JSON schema is valid, few schemas are refused.

Run as `python .ci/schemas.py` where jsonschema and hypothesis are installed. Three sources:
schemas drawn at random, schemas written by hand that must never be refused, and, if the variable
JSON_SCHEMA_TEST_SUITE names a copy of it, the official JSON-Schema-Test-Suite (the source
package of jsonschema has one in `json/`).
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile
import time
import warnings
from collections import Counter

import jsonschema
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from jsonschema import Draft4Validator, Draft7Validator, Draft202012Validator

DRAWN = 2000
MOST_REFUSED = 0.15  # of the drawn schemas that are satisfiable
SLOWEST = 1.0  # seconds of processor time for any one schema, on a busy machine

here = pathlib.Path(__file__).resolve().parent
source = os.environ.get("TOGETHER_FAKE_PATH") or str(here.parent / "together_fake.py")
spec = importlib.util.spec_from_file_location("together_fake", source)
assert spec and spec.loader
fake = importlib.util.module_from_spec(spec)
sys.modules["together_fake"] = fake
spec.loader.exec_module(fake)
warnings.simplefilter("ignore")  # about remote references, which are refused

set_hypothesis_home_dir(tempfile.mkdtemp())  # no folder beside the sources

results: Counter[str] = Counter()
slowest = 0.0


def fail(schema, reason):
    results["failed"] += 1
    if results["failed"] <= 20:
        print(f"FAILED {reason}\n  {json.dumps(schema)[:600]}")


def try_schema(schema, validator=Draft202012Validator, seed=0):
    """Return "made" or "refused: ...", and report an invalid instance or any other exception."""
    global slowest
    start = time.process_time()
    try:
        draw = fake.HashRandom.of("schema", [schema, seed])
        value = fake.make_instance(draw, schema)
        again = fake.make_instance(fake.HashRandom.of("schema", [schema, seed]), schema)
    except fake.Unsatisfiable as error:
        return f"refused: {error}"
    except Exception as error:
        fail(schema, f"{type(error).__name__}: {error}")
        return "failed"
    finally:
        slowest = max(slowest, time.process_time() - start)
        if time.process_time() - start > SLOWEST and "-v" in sys.argv:
            print("slow:", json.dumps(schema)[:600])
    value = json.loads(json.dumps(value))
    if again != value:
        fail(schema, "the same draw gave another instance")
        return "failed"
    try:
        problem = next(validator(schema).iter_errors(value), None)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "loops"
    if problem:
        fail(schema, f"invalid instance {json.dumps(value)[:300]}: {problem.message[:200]}")
        return "failed"
    return "made"


# Schemas drawn at random: (schema, instance) pairs, so that satisfiable ones are known.

NAMES = st.sampled_from(["name", "age", "email", "items", "kind", "x", "y_count", "créé"])
SCALARS = st.none() | st.booleans() | st.integers(-9, 99) | st.sampled_from(["", "a", "red", 1.5])
TYPES = ["string", "number", "integer", "object", "array", "boolean", "null"]
PATTERNS = [
    "^[a-z]+$",
    r"\d{2,4}",
    "^a|b$",
    "^(?=.*[A-Z]).{3,9}$",
    r"^\S+@\S+$",
    "x",
    "^[^ ]{0,5}$",
]
FORMATS = ["date-time", "date", "time", "email", "uri", "uuid", "ipv4", "ipv6", "hostname", "odd"]
REFS = st.sampled_from(["#/$defs/A", "#/$defs/B", "#", "#anchor"])
SMALL = st.integers(0, 4)
BOUNDS = st.integers(-20, 120) | st.floats(-10, 100).map(lambda number: round(number, 3))


def subset(**strategies):
    """Draw an object with some of the keywords, fewer rather than more."""
    keywords = list(strategies)
    chosen = st.lists(st.sampled_from(keywords), max_size=3, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({n: strategies[n] for n in names}))


def typed(kind, strategy):
    return st.tuples(strategy, st.integers(0, 3)).map(
        lambda pair: {"type": kind, **pair[0]} if pair[1] else pair[0]
    )


strings = typed(
    "string",
    subset(
        minLength=SMALL,
        maxLength=st.integers(2, 30),
        pattern=st.sampled_from(PATTERNS),
        format=st.sampled_from(FORMATS),
        default=SCALARS,
        examples=st.lists(SCALARS, max_size=3),
    ),
)
numbers = st.sampled_from(["number", "integer"]).flatmap(
    lambda kind: typed(
        kind,
        subset(
            minimum=BOUNDS,
            maximum=BOUNDS,
            exclusiveMinimum=BOUNDS,
            exclusiveMaximum=BOUNDS,
            multipleOf=st.sampled_from([1, 2, 5, 7, 0.5, 0.1, 0.01, 0.25, 2.5]),
            default=SCALARS,
        ),
    )
)
plain = (
    st.booleans().filter(bool)
    | st.just({})
    | st.fixed_dictionaries({"enum": st.lists(SCALARS, min_size=1, max_size=4)})
    | st.fixed_dictionaries({"const": SCALARS})
    | st.fixed_dictionaries({"type": st.lists(st.sampled_from(TYPES), min_size=1, unique=True)})
    | st.fixed_dictionaries({"$ref": REFS})
    | strings
    | numbers
)


def extend(inner):
    maps = st.dictionaries(NAMES, inner, max_size=4)
    inners = st.lists(inner, min_size=1, max_size=3)
    objects = subset(
        properties=maps,
        required=st.lists(NAMES, max_size=2, unique=True),
        additionalProperties=inner | st.booleans(),
        patternProperties=st.dictionaries(st.sampled_from(["^x", "e$", "a"]), inner, max_size=2),
        propertyNames=st.sampled_from([{"maxLength": 8}, {"pattern": "^[a-z_]+$"}]),
        minProperties=SMALL,
        maxProperties=st.integers(1, 6),
        dependentRequired=st.dictionaries(NAMES, st.lists(NAMES, max_size=2, unique=True)),
        dependentSchemas=st.dictionaries(NAMES, inner, max_size=2),
        unevaluatedProperties=inner | st.booleans(),
    )
    arrays = subset(
        items=inner,
        prefixItems=inners,
        contains=inner,
        minContains=SMALL,
        maxContains=st.integers(1, 3),
        unevaluatedItems=inner | st.booleans(),
        minItems=SMALL,
        maxItems=st.integers(1, 6),
        uniqueItems=st.booleans(),
    )
    logic = subset(
        anyOf=inners,
        oneOf=inners,
        allOf=inners,
        **{"not": inner, "if": inner, "then": inner, "else": inner},
        unevaluatedProperties=st.booleans(),
    )
    mixed = st.tuples(logic, plain.filter(lambda part: isinstance(part, dict))).map(
        lambda pair: {**pair[1], **pair[0]}
    )
    return typed("object", objects) | typed("array", arrays) | mixed | typed("object", logic)


schemas = st.recursive(plain, extend, max_leaves=6)


@st.composite
def documents(draw):
    schema = draw(schemas)
    if isinstance(schema, bool):
        return schema
    anchored = draw(schemas)
    anchored = {"$anchor": "anchor", **(anchored if isinstance(anchored, dict) else {})}
    return {**schema, "$defs": {"A": draw(schemas), "B": anchored}}


refusals: list[tuple[object, str]] = []


@settings(
    max_examples=DRAWN,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(documents())
def try_drawn(schema):
    if "#" in json.dumps(schema) and loops(schema):
        results["loops"] += 1
        return
    outcome = try_schema(schema)
    results[outcome.split(":")[0]] += 1
    if outcome.startswith("refused"):
        refusals.append((schema, outcome))


def loops(schema):
    """Tell whether the validator itself never ends on the schema."""
    try:
        for value in CANDIDATES:
            Draft202012Validator(schema).is_valid(value)
    except BaseException as error:  # its Rust parts turn a RecursionError into a panic
        if isinstance(error, KeyboardInterrupt):
            raise
        return True
    return False


CANDIDATES = [
    *(
        None,
        True,
        False,
        0,
        1,
        5,
        50,
        -3,
        1.5,
        20.25,
        "",
        "a",
        "red",
        "abc",
        "aB1",
        "b",
        "Ab",
        "12",
    ),
    *("a@b", "x", [], [1], ["a"], [None], [1, "a"], [[]], [{}], [1, 2, 3], ["a", "b", 1, None], {}),
    *({"name": "a"}, {"age": 1}, {"x": 1}, {"x": "a"}, {"x": None}, {"name": 1, "age": 1, "x": 1}),
    *({"kind": "red"}, {"items": []}, {"email": "a@b"}, {"x": {}}, {"x": []}, {"name": None}),
    {"name": "abc", "age": 5, "email": "ab", "items": [], "kind": "a", "x": 1, "y_count": 2},
    *(
        [{}, {}],
        [True],
        [True, False],
        [0, 1, 2, 3],
        ["12"],
        [[], {}],
        ["red", "a"],
        [1.5, 2, 5, 7],
    ),
    *({"créé": 1}, {"créé": "a"}, {"y_count": 1}, {"name": {}}, {"a": 1, "b": 2, "c": 3, "d": 4}),
]


def is_satisfiable(schema):
    """Tell whether one of the candidates is valid; they are few, so this may say no wrongly."""
    validator = Draft202012Validator(schema)
    return any(validator.is_valid(value) for value in CANDIDATES)


# Schemas written by hand, which must not be refused.


def record(required=None, defs=None, **properties):
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    schema["required"] = list(properties) if required is None else required
    return {**schema, "$defs": defs} if defs else schema


TEXT, NUMBER, WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
NULL, FLAG = {"type": "null"}, {"type": "boolean"}
ADDRESS = {**record(street=TEXT, city=TEXT), "title": "Address"}
TREE = record(["value"], value=WHOLE, children={"type": "array", "items": {"$ref": "#/$defs/Tree"}})
CAT = record(kind={"const": "cat", "type": "string"}, lives=WHOLE)
DOG = record(kind={"const": "dog", "type": "string"}, name=TEXT)
LITERAL = record(op={"const": "num"}, value=NUMBER)
BINARY = record(
    op={"enum": ["add", "mul"]}, left={"$ref": "#/$defs/Expr"}, right={"$ref": "#/$defs/Expr"}
)
PASSWORD = r"^(?=.*[a-z])(?=.*[A-Z])(?=.*\d)[A-Za-z\d]{8,}$"
ZOD_EMAIL = (
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]"
    r"@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
)
ZOD_UUID = (
    r"^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12})$"
)
ZOD_DATE = (
    r"^(?:(?:\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)-02-29|\d{4}-(?:(?:0[13578]"
    r"|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|(?:02)-(?:0[1-9]|1\d|2[0-8])))$"
)
MUST_WORK = [
    *(True, {}, {"type": "string"}, {"type": "object"}, {"type": "array"}, {"type": "null"}),
    *({"type": ["string", "null"]}, {"type": ["null"]}, {"type": ["integer", "array"]}),
    *({"enum": ["red", "blue"]}, {"enum": [1, None, {"a": []}]}, {"enum": [1, 2], "minimum": 2}),
    *({"const": 5}, {"const": {"a": [1, 2.5, None]}}, {"const": False}, {"const": None}),
    *({**WHOLE, "default": 7}, {**WHOLE, "default": "bad"}, {**TEXT, "default": None}),
    *(
        {**TEXT, "examples": ["one", "two"]},
        {**WHOLE, "examples": ["bad"]},
        {"examples": [{"a": 1}]},
    ),
    *(
        {**WHOLE, "minimum": 10**12},
        {**WHOLE, "maximum": -5},
        {**WHOLE, "minimum": 3, "maximum": 3},
    ),
    *({**NUMBER, "minimum": 0, "maximum": 1}, {**NUMBER, "minimum": 0.001, "maximum": 0.002}),
    *({**NUMBER, "exclusiveMinimum": 0, "exclusiveMaximum": 1e-9}, {**NUMBER, "minimum": -1e300}),
    *({**WHOLE, "exclusiveMinimum": 4, "exclusiveMaximum": 6}, {**WHOLE, "minimum": 2.5}),
    *({**WHOLE, "exclusiveMinimum": 0.5}, {**NUMBER, "exclusiveMaximum": 0}, {"minimum": 3}),
    *({**NUMBER, "multipleOf": 0.01}, {**NUMBER, "multipleOf": 0.1, "minimum": 3, "maximum": 4}),
    *({**WHOLE, "multipleOf": 7}, {**WHOLE, "multipleOf": 2.5}, {**WHOLE, "multipleOf": 1000}),
    {"allOf": [{**WHOLE, "multipleOf": 4}, {"multipleOf": 6}], "minimum": 100},
    *(
        {**TEXT, "minLength": 40},
        {**TEXT, "maxLength": 2},
        {**TEXT, "minLength": 3, "maxLength": 3},
    ),
    *({**TEXT, "maxLength": 0}, {**TEXT, "minLength": 5000}, {**TEXT, "minLength": 2.0}),
    *({**TEXT, "pattern": source} for source in ("^[a-z]+$", r"^\d{5}$", "^[A-Z]{2,3}-\\d+$", "")),
    *({**TEXT, "pattern": source} for source in (PASSWORD, ZOD_EMAIL, ZOD_UUID, ZOD_DATE, "a|b")),
    {**TEXT, "pattern": "(?i)^AB[c-e]{3}$"},
    *({**TEXT, "pattern": source} for source in (r"^\+?[1-9]\d{1,14}$", r"^https?://", "^(a+)+$")),
    *({**TEXT, "pattern": source} for source in (r"^[^\s@]+@[^\s@]+\.[^\s@]+$", r"\.json$", "^$")),
    {**TEXT, "pattern": "^[a-z]+$", "minLength": 30, "maxLength": 32},
    {**TEXT, "pattern": "^ab", "minLength": 20},
    {"enum": [10**350, 6], "multipleOf": 1.5},
    {"allOf": [{**TEXT, "pattern": "^[a-z0-9]+$"}, {"pattern": "[0-9]"}]},
    *({**TEXT, "format": name} for name in FORMATS),
    *({**TEXT, "format": name} for name in ("duration", "uri-reference", "url", "byte", "regex")),
    {**TEXT, "format": "email", "pattern": ZOD_EMAIL},
    {**TEXT, "format": "uuid", "pattern": ZOD_UUID},
    {**TEXT, "format": "date", "pattern": ZOD_DATE},
    {**TEXT, "format": "uri", "minLength": 1, "maxLength": 2083},
    record(name=TEXT, age=WHOLE, email=TEXT),
    record([], name=TEXT, nick={"anyOf": [TEXT, NULL], "default": None}),
    *({"properties": {"a": WHOLE}, "required": ["a", "b"]}, {"required": ["x"]}),
    *({"type": "object", "minProperties": 3}, {"type": "object", "maxProperties": 0}),
    {"type": "object", "properties": {"a": WHOLE, "b": WHOLE, "c": WHOLE}, "maxProperties": 2},
    {"type": "object", "additionalProperties": WHOLE, "minProperties": 4},
    {"type": "object", "additionalProperties": {"type": "array", "items": NUMBER}},
    {"type": "object", "patternProperties": {"^x-[a-z]+$": TEXT}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^n": WHOLE}, "required": ["n1", "other"]},
    {"type": "object", "propertyNames": {"pattern": "^[A-Z]{3}$"}, "minProperties": 2},
    {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": WHOLE},
    {"properties": {"bad": False, "good": WHOLE}},
    *({"type": "array", "items": WHOLE, "minItems": 5}, {"type": "array", "maxItems": 0}),
    {"type": "array", "items": {"enum": ["a", "b", "c", "d"]}, "uniqueItems": True, "minItems": 4},
    {"type": "array", "items": FLAG, "uniqueItems": True, "minItems": 2},
    {
        "type": "array",
        "items": {**WHOLE, "minimum": 1, "maximum": 9},
        "minItems": 9,
        "uniqueItems": True,
    },
    {"type": "array", "prefixItems": [WHOLE, TEXT], "minItems": 2, "maxItems": 2},
    {"type": "array", "prefixItems": [WHOLE], "items": TEXT, "minItems": 4},
    {"type": "array", "prefixItems": [WHOLE, TEXT], "items": False},
    {"type": "array", "contains": {"const": "needle"}},
    {
        "type": "array",
        "items": WHOLE,
        "contains": {"minimum": 90},
        "minItems": 3,
    },
    record(
        home={"$ref": "#/$defs/Address"},
        work={"$ref": "#/$defs/Address"},
        defs={"Address": ADDRESS},
    ),
    {
        "definitions": {"Name": TEXT},
        "properties": {"n": {"$ref": "#/definitions/Name"}},
        "required": ["n"],
    },
    {"$ref": "#/$defs/Tree", "$defs": {"Tree": TREE}},
    {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "value": WHOLE},
        "required": ["value"],
    },
    {"anyOf": [{"$ref": "#/$defs/Expr"}], "$defs": {"Expr": {"anyOf": [BINARY, LITERAL]}}},
    {"$ref": "#/$defs/a~1b/properties/x%20y", "$defs": {"a/b": {"properties": {"x y": WHOLE}}}},
    {"$defs": {"A": {"$anchor": "here", "type": "integer"}}, "$ref": "#here"},
    {"$id": "https://e.org/s", "$ref": "#/$defs/A", "$defs": {"A": TEXT}},
    {"$ref": "#/$defs/A", "minimum": 50, "$defs": {"A": {**WHOLE, "maximum": 60}}},
    {"anyOf": [TEXT, NULL]},
    {"anyOf": [{"minimum": 9, "maximum": 3, "type": "number"}, {"const": "only"}]},
    {"oneOf": [CAT, DOG], "discriminator": {"propertyName": "kind"}},
    {"oneOf": [WHOLE, {**NUMBER, "minimum": 5}]},
    {
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
        "type": "object",
        "properties": {"a": TEXT, "b": TEXT},
    },
    {
        "allOf": [
            record(["a"], a=TEXT) | {"additionalProperties": True},
            {"properties": {"b": WHOLE}, "required": ["b"]},
        ]
    },
    {"allOf": [{"minimum": 2}, {"maximum": 3}], "type": "integer"},
    {"allOf": [{"anyOf": [TEXT, WHOLE]}, {"anyOf": [WHOLE, FLAG]}]},
    {
        "allOf": [
            {"properties": {"a": {"minimum": 4}}},
            {"properties": {"a": {"maximum": 4, "type": "number"}}},
        ],
        "required": ["a"],
    },
    *({"not": TEXT}, {"not": {"type": ["object", "array"]}}, {**WHOLE, "not": {"minimum": 5}}),
    {"type": "object", "properties": {"a": TEXT, "b": TEXT}, "not": {"required": ["a"]}},
    *({**WHOLE, "not": {"minimum": 10}}, {**TEXT, "not": {"maxLength": 40}}),
    *({"not": {"not": {"type": "array", "minItems": 4}}}, {**NUMBER, "not": {"maximum": 1000}}),
    {**WHOLE, "not": {"allOf": [{"minimum": -(10**6)}, {"maximum": 10**6}]}},
    {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"enum": list("abcdefgh")}},
        "allOf": [
            {
                "if": {"properties": {"kind": {"const": kind}}},
                "then": {"required": [f"{kind}1"], "properties": {f"{kind}1": {"minimum": at}}},
            }
            for at, kind in enumerate("abcdefgh")
        ],
    },
    {"oneOf": [{"required": [name]} for name in "abcdefgh"], "type": "object"},
    {**TEXT, "allOf": [{"pattern": "^foo"}, {"pattern": "-mid-"}, {"pattern": "bar$"}]},
    {"propertyNames": {"enum": ["a", "b"]}, "minProperties": 2, "type": "object"},
    {"allOf": [{"properties": {"b": WHOLE}}], "unevaluatedProperties": False, "required": ["b"]},
    {"prefixItems": [WHOLE], "unevaluatedItems": TEXT, "minItems": 3, "type": "array"},
    {"type": "array", "items": WHOLE, "contains": {"minimum": 50}, "minContains": 3},
    {"type": "array", "items": WHOLE, "contains": {"const": 1}, "maxContains": 1, "minItems": 4},
    {"$dynamicAnchor": "n", "type": "object", "properties": {"next": {"$dynamicRef": "#n"}}},
    {"$id": "https://e.org/s", "$ref": "https://e.org/s#/$defs/A", "$defs": {"A": TEXT}},
    {
        "$id": "https://e.org/s",
        "properties": {"a": {"$ref": "part.json#/$defs/N"}},
        "required": ["a"],
        "$defs": {"P": {"$id": "part.json", "$defs": {"N": WHOLE}}},
    },
    {"$ref": "#/components/schemas/A", "components": {"schemas": {"A": TEXT}}},
    {"properties": {"schema": {"$ref": "http://json-schema.org/draft-07/schema#"}}},
    {**TEXT, "not": {"enum": ["", "a"]}},
    {"enum": ["a", "b", "c"], "not": {"enum": ["a", "c"]}},
    {
        "properties": {"country": {"enum": ["US", "DE"]}, "zip": TEXT},
        "if": {"properties": {"country": {"const": "US"}}},
        "then": {"properties": {"zip": {"pattern": "^[0-9]{5}$"}}},
        "else": {"properties": {"zip": {"pattern": "^[A-Z]-[0-9]{4}$"}}},
        "required": ["country", "zip"],
        "type": "object",
    },
    {"if": {"type": "string"}, "then": {"minLength": 30}, "else": {"const": 4}},
    {
        "type": "object",
        "properties": {"card": TEXT, "address": TEXT},
        "dependentRequired": {"card": ["address"]},
        "required": ["card"],
    },
    {
        "type": "object",
        "properties": {"a": TEXT},
        "dependentSchemas": {"a": {"required": ["b"], "properties": {"b": WHOLE}}},
    },
    *({"type": "string", "nullable": True}, record(note={"type": "string", "nullable": True})),
    record(
        rating={**NUMBER, "minimum": 0, "maximum": 5},
        tags={"type": "array", "items": TEXT, "maxItems": 3},
    ),
    {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **record(when={**TEXT, "format": "date-time"}),
    },
    {"x-vendor": 3, "title": 5, "description": ["odd"], "type": "integer"},
    {
        "type": "object",
        "properties": {"type": TEXT, "properties": TEXT, "$ref": TEXT, "enum": WHOLE},
        "required": ["$ref"],
    },
    record(
        steps={"type": "array", "items": record(explanation=TEXT, output=TEXT)}, final_answer=TEXT
    ),
    record(**{f"field_{n}": [TEXT, WHOLE, NUMBER, FLAG][n % 4] for n in range(60)}),
    record(point={"type": "array", "prefixItems": [NUMBER, NUMBER], "minItems": 2, "maxItems": 2}),
    record(payload={"anyOf": [CAT, DOG, NULL]}, mode={"anyOf": [{"const": "a"}, {"const": "b"}]}),
    record(limit={"exclusiveMinimum": 0, "maximum": 9007199254740991, "type": "integer"}),
    record(data={"type": "object", "propertyNames": TEXT, "additionalProperties": {}}),
]
DRAFT_4 = [
    {
        "type": "integer",
        "minimum": 3,
        "exclusiveMinimum": True,
        "maximum": 5,
        "exclusiveMaximum": True,
    },
    {"type": "number", "minimum": 3, "exclusiveMinimum": False, "maximum": 3},
]
DRAFT_7 = [
    {"required": ["a"], "dependencies": {"a": ["b"], "b": {"required": ["c"]}}, "type": "object"},
    {"properties": {"x": {"$id": "#foo", "type": "integer"}, "y": {"$ref": "#foo"}}},
    {"type": "array", "items": [WHOLE, TEXT], "additionalItems": False, "minItems": 2},
    {"type": "array", "items": [WHOLE], "additionalItems": TEXT, "minItems": 3},
]
MUST_REFUSE = [
    *(
        False,
        3,
        None,
        [],
        "x",
        {"type": "strin"},
        {"type": []},
        {"properties": 3},
        {"required": "a"},
    ),
    *(
        {"$ref": "#/$defs/no"},
        {"$ref": "https://example.com/x"},
        {"$ref": "#"},
        {"anyOf": {}},
        {"enum": 1},
    ),
    *(
        {**WHOLE, "minimum": 5, "maximum": 3},
        {**TEXT, "minLength": 10**9},
        {"enum": []},
        {"not": {}},
    ),
    *({"type": "array", "minItems": 10**9}, {"type": "object", "minProperties": 10**9}),
    *({**TEXT, "pattern": "("}, {**TEXT, "pattern": "a{1000000}"}, {"pattern": "(a{5000}){5000}"}),
    *({**TEXT, "enum": [1]}, {"allOf": [TEXT, WHOLE]}, {"minLength": "3"}, {"minLength": -1}),
    *({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, {"multipleOf": 0}),
    # Refused because they are not supported.
    {"$ref": "#/$defs/A", "$defs": {"A": {"$id": "https://e.org/a", "$ref": "#/$defs/B"}}},
    {"$dynamicRef": "#a"},
    *({**TEXT, "pattern": source} for source in (r"^\p{L}+$", r"(a)\1", "(?<=a)b", "[]")),
    {"enum": ["a" * 5000 + "!"], "pattern": "^(a+)+$"},
    {"type": "array", "minItems": 400, "items": {"type": "array", "minItems": 400, "items": WHOLE}},
    {"$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(5000)}, "$ref": "#/$defs/0"},
    {"allOf": [{"anyOf": [{"const": i}, {"const": -i}]} for i in range(1, 60)]},
]


def try_written():
    for schemas_of, validator in (
        (MUST_WORK, Draft202012Validator),
        (DRAFT_4, Draft4Validator),
        (DRAFT_7, Draft7Validator),
    ):
        for schema in schemas_of:
            for seed in range(5):
                outcome = try_schema(schema, validator, seed)
                results[outcome.split(":")[0]] += 1
                if outcome.startswith("refused"):
                    fail(schema, outcome)
    for schema in MUST_REFUSE:
        outcome = try_schema(schema, lambda schema: jsonschema.Draft202012Validator(True))
        results["refused" if outcome.startswith("refused") else "made"] += 1
        if not outcome.startswith("refused"):
            fail(schema, f"was not refused but {outcome}")


def try_patterns():
    for schema in MUST_WORK:
        if isinstance(schema, dict) and isinstance(schema.get("pattern"), str):
            for seed in range(5):
                text = fake.make_matching(fake.HashRandom.of("pattern", seed), schema["pattern"])
                results["made"] += 1
                if not re.fullmatch(schema["pattern"], text):
                    fail(schema, f"{text!r} does not match")


def try_suite(folder):
    """Try each schema of the official test suite that some of its tests call valid."""
    refused = Counter()
    total = 0
    for draft, validator in (("draft2020-12", Draft202012Validator), ("draft7", Draft7Validator)):
        for path in sorted(glob.glob(f"{folder}/tests/{draft}/*.json")):
            for group in json.loads(pathlib.Path(path).read_text(encoding="utf-8")):
                old = "prevents a sibling $id" in group["description"]  # not read as draft 7 does
                if old or not any(test["valid"] for test in group["tests"]):
                    continue
                try:
                    validator(group["schema"]).is_valid(group["tests"][0]["data"])
                except Exception:
                    continue  # needs the suite's own remote documents
                total += 1
                outcome = try_schema(group["schema"], validator)
                results[outcome.split(":")[0]] += 1
                if outcome.startswith("refused"):
                    refused[f"{draft}/{pathlib.Path(path).name}"] += 1
                    if "-v" in sys.argv:
                        print(group["description"], "|", outcome)
    print(
        f"test suite: {total} satisfiable schemas, {sum(refused.values())} refused: {dict(refused)}"
    )


def main():
    try_written()
    try_patterns()
    print(f"written by hand: {dict(results)}")
    results_before = results["made"]
    try_drawn()
    made = results["made"] - results_before
    wrong = [(schema, reason) for schema, reason in refusals if is_satisfiable(schema)]
    rate = len(wrong) / max(1, made + len(wrong))
    print(f"drawn: {made} made, {len(refusals)} refused, {len(wrong)} of these are satisfiable")
    for schema, reason in wrong[: 20 if "-v" in sys.argv else 3]:
        print(f"  {reason[:160]}\n    {json.dumps(schema)[:300]}")
    if rate > MOST_REFUSED:
        fail(None, f"{rate:.0%} of the satisfiable drawn schemas are refused")
    if os.environ.get("JSON_SCHEMA_TEST_SUITE"):
        try_suite(os.environ["JSON_SCHEMA_TEST_SUITE"])
    if slowest > SLOWEST:
        fail(None, f"one schema took {slowest:.1f} s")
    print(f"slowest schema: {slowest:.2f} s")
    passed = sum(results.values()) - results["failed"] - results["loops"]
    print(f"{passed} passed, {results['failed']} failed")
    sys.exit(bool(results["failed"]))


if __name__ == "__main__":
    main()
