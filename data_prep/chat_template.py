"""Chat templates of other people's tokenizers: sandboxed, and bounded in time and memory.

A template is a program that came with a tokenizer. Jinja's immutable sandbox keeps it from Python
and from files, with the filters, functions and tags that transformers gives templates; it bounds
neither loops in loops, nor texts that double, nor lists that hold themselves twice, forty times
over. Here every operation that can repeat or enlarge something is paid for from a budget that
grows with the conversation:

    a turn of a loop, a macro       one, and one for every 16 nodes and 64 characters in its body
    an operation on values          what it reads: one a value within, and one for 64 characters
    a value that a filter yields    one
    a repetition, a padding,        what it will write, before it does
    a format

So a rendering ends after a second or so and holds no text longer than `Budget.longest`. An
operation may be dearer than its price (keys made to collide in a table); one that goes on with
that has `SECONDS` of processor time. What no chat template needs and could not be bounded is not
there: filters that wrap, centre, make batches or draw at random, and methods that translate, strip
tags or have to do with bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, update_wrapper
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context, pass_eval_context
from jinja2.visitor import NodeTransformer

from data_prep.template_budget import (
    LARGE_NUMBER,
    LARGEST_BITS,
    REMAINDERS,
    Budget,
    TemplateLimitError,
    current_budget,
    pay_for_format,
    pay_for_join,
    pay_for_keys,
    pay_for_product,
    pay_for_writing,
)

LONGEST_TEMPLATE = 1 << 18
_TOO_DEEP = "it nests deeper than Python follows it"

FILTERS = frozenset(
    """
    abs attr capitalize count d default dictsort e escape first float format groupby indent int
    items join last length list lower map max min reject rejectattr replace reverse round safe
    select selectattr sort string sum title tojson trim truncate unique upper wordcount
    """.split()  # noqa: SIM905 - a table to read
)
# Methods that write more than they read, or read it often, in ways of their own; and bytes, whose
# methods have them all again.
FORBIDDEN = frozenset(
    (
        *("decode", "encode", "expandtabs", "from_bytes", "fromkeys"),
        *("maketrans", "striptags", "to_bytes", "translate"),
    )
)
# Tests that look at all of a value.
READING = (
    *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">="),
    *("<", "lt", "lessthan", "<=", "le", "in", "lower", "upper", *REMAINDERS),
)
# Filters of our own, by names that no template can spell as a name.
_TURN, _READ, _TEXT = "boxed turn", "boxed read", "boxed text"


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja.

    Raises:
        TemplateError: It cannot be compiled; `TemplateLimitError` where it is longer than
            `LONGEST_TEMPLATE`, or nests too deeply.
    """

    def __init__(self, source: str) -> None:
        """Compile it."""
        if len(source) > LONGEST_TEMPLATE:
            raise TemplateLimitError(f"it has {len(source)} characters, over {LONGEST_TEMPLATE}")
        token = current_budget.set(Budget(0, 0))  # what is constant is computed now
        try:
            self._template = _Sandbox().from_string(source)
        # Of what Jinja makes of it, Python's own parser and compiler say so in these ways.
        except (RecursionError, MemoryError, IndentationError):
            raise TemplateLimitError(_TOO_DEEP) from None
        except SyntaxError as error:
            if "nested" in error.msg:
                raise TemplateLimitError(_TOO_DEEP) from None
            # Jinja leaves to Python what stands in a wrong place, and what is named twice.
            raise TemplateError(error.msg) from None
        finally:
            current_budget.reset(token)

    def render(
        self, messages: Sequence[Mapping[str, str]], **variables: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation's text, and which characters of it are generated.

        Args:
            messages: The conversation.
            **variables: What the template may refer to by name.

        Raises:
            Exception: Whatever the template, a program, fails with; `TemplateLimitError` where it
                takes too long or nests too deeply.
        """
        budget = Budget(len(messages), sum(len(message["content"]) for message in messages))
        token = current_budget.set(budget)
        try:
            written = []
            for text in self._template.generate(messages=messages, **variables):
                written.append(text)
                budget.written += len(text)
                budget.write(len(text), budget.written)
            return "".join(written), budget.spans
        except RecursionError:
            raise TemplateLimitError(_TOO_DEEP) from None
        finally:
            current_budget.reset(token)


@lru_cache(maxsize=64)
def chat_template(source: str) -> ChatTemplate:
    """Return a compiled template, the same one for the same text."""
    return ChatTemplate(source)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: the assistant says it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.CallBlock:
        """Return a call that is given what stands between the markers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_mark"), [], [], body)
        block.set_lineno(line)
        return block

    @pass_eval_context
    def _mark(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        text = caller()
        budget = current_budget.get()
        budget.spans.append((budget.written, budget.written + len(text)))
        return text


class _Paid(NodeTransformer):
    """Lets the nodes of a template pay for what they repeat and read."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            turn = self._filter(nodes.Const(_price([node.test])), _TURN, node.lineno)
            node.test = nodes.And(turn, node.test)
        return self._repeated(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return self._repeated(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        self.generic_visit(node)
        return self._repeated(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        return self._repeated(node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [self._read(child) for child in node.nodes]
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        node.items = [self._read(item) for item in node.items]
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if node.ctx == "load":
            node.items = [self._read(item) for item in node.items]
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key, node.value = self._read(node.key), self._read(node.value)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides = (node.expr, *(operand.expr for operand in node.ops))
        if any(isinstance(side, nodes.Const) for side in sides) and not any(
            operand.op in ("in", "notin") for operand in node.ops
        ):
            return node  # a constant differs from anything large at its first look
        node.expr = self._read(node.expr)
        for operand in node.ops:
            operand.expr = self._read(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._read(node.node)
        else:
            node.arg = self._read(node.arg)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        # `a ~ b` is the sum of their texts, which `call_binop` sees. Of many they are added in
        # pairs, and those in pairs again, so that no sum stands deep within others.
        self.generic_visit(node)
        texts: list[nodes.Expr] = [self._filter(child, _TEXT) for child in node.nodes]
        while len(texts) > 1:
            pairs = [
                nodes.Add(*pair, lineno=node.lineno)
                for pair in zip(texts[::2], texts[1::2], strict=False)
            ]
            texts = [*pairs, *texts[len(pairs) * 2 :]]
        return texts[0]

    def _repeated(self, node: Any) -> nodes.Node:
        turn = self._filter(nodes.Const(_price(node.body)), _TURN, node.lineno)
        node.body.insert(0, nodes.ExprStmt(turn).set_lineno(node.lineno))
        return node

    def _read(self, node: nodes.Expr) -> nodes.Expr:
        # Sums have paid for what they are.
        cheap = (nodes.Const, nodes.TemplateData, nodes.Test, nodes.Compare, nodes.Not, nodes.Add)
        return node if isinstance(node, cheap) else self._filter(node, _READ)

    @staticmethod
    def _filter(node: nodes.Expr, name: str, line: int = 0) -> nodes.Filter:
        line = line or node.lineno or 1
        return nodes.Filter(node, name, [], [], None, None, lineno=line)


def _price(body: Sequence[nodes.Node]) -> int:
    """Return what one turn of a body costs beside what its operations read."""
    found, characters, waiting = 0, 0, list(body)
    while waiting:
        node = waiting.pop()
        found += 1
        characters += len(node.data) if isinstance(node, nodes.TemplateData) else 0
        waiting.extend(node.iter_child_nodes())
    return 1 + (found >> 4) + (characters >> 6)


class _Names(Namespace):
    """Jinja's, without a text that spells out what is within."""

    __repr__ = object.__repr__


class _Sandbox(ImmutableSandboxedEnvironment):
    """What transformers gives chat templates, paid for."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            # It looks through all that stands within, again at each depth.
            optimized=False,
        )
        kept = {**{name: self.filters[name] for name in FILTERS}, "tojson": _tojson}
        self.filters = {name: _paid(name, function) for name, function in kept.items()}
        self.filters |= {_TURN: _turn, _READ: _read, _TEXT: _text}
        self.tests = dict(self.tests)
        for name in READING:
            self.tests[name] = _paid(name, self.tests[name])
        del self.globals["lipsum"]
        self.globals |= {"range": _range, "namespace": _Names}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}

    def _generate(
        self, source: nodes.Template, name: Any, filename: Any, defer_init: bool = False
    ) -> str:
        source = _Paid().visit(source)
        source.set_environment(self).set_lineno(1)  # of what has none
        return super()._generate(source, name, filename, defer_init)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in FORBIDDEN and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current_budget.get()
        if operator == "+" and type(left) is str and type(right) is str:  # most of what there is
            length = len(left) + len(right)
            budget.left -= 1 + (length >> 5)
            if budget.left < 0 or length > budget.longest:
                budget.write(length)
                budget.spend(0)
            return left + right
        budget.read(left)
        budget.read(right)
        if operator == "*":
            pay_for_product(budget, left, right)
            pay_for_product(budget, right, left)
        elif operator == "**":
            if isinstance(left, int) and left.bit_length() * abs(int(right)) > LARGEST_BITS:
                raise TemplateLimitError(LARGE_NUMBER)
        elif operator == "%" and isinstance(left, str):
            pay_for_format(budget, left, [right])
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            budget.write(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    # By place: a template may give a macro an argument of these names.
    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        budget = current_budget.get()
        budget.spend(1)
        for value in (*args, *kwargs.values()):
            budget.read(value)
        own, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if own is not None:
            budget.read(own)
            if name == "join" and isinstance(own, str) and len(args) == 1:
                args = (pay_for_join(budget, own, args[0]),)
            pay_for_writing(budget, name, own, args, kwargs)
        elif obj is dict:
            args = tuple(pay_for_keys(budget, pairs) for pairs in args)
        # The sandbox's own `format` and `format_map` are functions around those of the text.
        text = getattr(getattr(obj, "__wrapped__", None), "__self__", None)
        if isinstance(text, str):
            pay_for_format(budget, text, (*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)


def _paid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter or test that pays for what it reads and writes."""
    # Some are given Jinja's context, or its environment, first.
    first = int(hasattr(function, "jinja_pass_arg"))

    def paid(*args: Any, **kwargs: Any) -> Any:
        budget = current_budget.get()
        before, (value, *rest) = args[:first], args[first:]
        budget.read(value)
        for other in (*rest, *kwargs.values()):
            budget.read(other)
        if name == "join":
            separator = rest[0] if rest else kwargs.get("d", "")
            value = pay_for_join(budget, separator, value)
        elif name == "unique":
            value = pay_for_keys(budget, value)
        else:
            pay_for_writing(budget, name, value, rest, kwargs)
        found = function(*before, value, *rest, **kwargs)
        return _paid_one_by_one(found) if isinstance(found, Iterator) else found

    return update_wrapper(paid, function)


def _paid_one_by_one(values: Iterator[Any]) -> Iterator[Any]:
    """Yield values, each paid for: filters behind one another hand on all of them."""
    for value in values:
        current_budget.get().spend(1)
        yield value


@pass_context  # so that nothing computes it beforehand, as if it were constant
def _turn(context: Context, price: Any) -> bool:
    current_budget.get().spend(max(1, int(price)))
    return True


def _read(value: Any) -> Any:
    current_budget.get().read(value)
    return value


def _text(value: Any) -> str:
    current_budget.get().read(value)
    return "".join((str(value),))  # text that is marked as safe becomes a plain one


def _range(*bounds: int) -> range:
    found = range(*bounds)
    current_budget.get().spend(len(found))
    return found


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # As transformers has it: Jinja's own writes for pages, with <, > and & escaped.
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None and separators is None:
        return encoder.encode(value)
    # What stands between values may be far longer than they are.
    budget, parts, length = current_budget.get(), list[str](), 0
    if isinstance(indent, int):
        budget.write(max(0, indent))
    for part in encoder.iterencode(value):
        length += len(part)
        budget.write(len(part), length)
        budget.spend(1)
        parts.append(part)
    return "".join(parts)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    current_budget.get().write(256 * len(form))  # where the C library stops
    return datetime.now().strftime(form)
