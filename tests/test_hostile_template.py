"""Chat templates that nest without end, or make gigabytes in one operation, are stopped and named."""

from pathlib import Path

import pytest

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.template import LARGEST, ChatTemplate

DEPTH = LARGEST - 100
TOO_DEEP = {
    "parentheses": "{{ " + "(" * (DEPTH // 2) + "1" + ")" * (DEPTH // 2) + " }}",
    "lists": "{{ " + "[" * (DEPTH // 2) + "]" * (DEPTH // 2) + " }}",
    "signs": "{{ " + "-" * DEPTH + "1 }}",
    "sums": "{{ " + "1+" * (DEPTH // 2) + "1 }}",
    "attributes": "{{ x" + ".a" * (DEPTH // 2) + " }}",
    "calls": "{{ x" + "()" * (DEPTH // 2) + " }}",
    "filters": "{{ x" + "|e" * (DEPTH // 2) + " }}",
    "conditions": "{{ " + "1 if 1 else " * (DEPTH // 12) + "1 }}",
    "ifs": "{% if 1 %}" * (DEPTH // 22) + "{% endif %}" * (DEPTH // 22),
    "elifs": "{% if 1 %}" + "{% elif 1 %}" * (DEPTH // 13) + "{% endif %}",
    "macros": "{% macro f() %}" * (DEPTH // 31) + "{% endmacro %}" * (DEPTH // 31),
    "braces": "{" * DEPTH,
    "calling itself": "{% macro f(n) %}{% call(x) g(n) %}{{ f(n) }}{% endcall %}{% endmacro %}"
    "{% macro g(n) %}{{ caller(n) }}{% endmacro %}{{ f(1) }}",
    "calling what it is given": "{% macro f(g) %}{{ g(g) }}{% endmacro %}{{ f(f) }}",
    "generators": "{% set ns = namespace(x=[1]) %}{% for i in range(15000) %}{% set ns.x = ns.x | map('upper') %}"
    "{% endfor %}{{ ns.x | list }}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(1500) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x | tojson }}",
    "a surrogate": "\ud800",
    "a surrogate in an expression": "{{ '\ud800' }}",
}


@pytest.mark.parametrize("name", TOO_DEEP)
def test_templates_that_are_too_deep(name):
    with pytest.raises(ModelError, match="the chat template fails") as caught:
        ChatTemplate(TOO_DEEP[name], {}, Path("template"))
    assert caught.value.hint


@pytest.mark.parametrize("body", ["{{ x }}", "{% set x=1 %}", "{% if x %}{% endif %}", "{{ [1] }}"])
def test_long_flat_templates_are_compiled(body):
    ChatTemplate(body * 3000, {}, Path("template"))


LARGE = [  # one operation each, that would make gigabytes or take hours
    "{{ ('{0}' * 100000).format('a' * 1000000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'a' * 1000000} }}",
    "{{ ('a' * 100000).translate({97: 'b' * 9999}) }}",
    "{{ ('\\t' * 100000).expandtabs(9999) }}",
    "{{ ([[]] * 100000) | tojson(indent=9999) }}",
    "{{ ([[]] * 100000) | tojson(false, 9999) }}",
    "{{ ([[]] * 100000) | tojson(indent='x' * 9999) }}",
    "{{ ([1] * 100000) | tojson(separators=['x' * 9999, ':']) }}",
    "{{ ('x\\n' * 1000000) | indent(9999) }}",
    "{{ ('x\\n' * 1000000) | indent(width='y' * 9999) }}",
    "{{ ([[1]] * 1000000) | sum(start=[]) | length }}",
    "{{ (3 ** 3000000) // (3 ** 1400000) }}",
    "{% set x = 'a' * 2000000 %}" + "".join(f"{{% set a{n} = x[1:] %}}" for n in range(5000)),
]


@pytest.mark.parametrize("source", LARGE)
def test_no_single_operation_is_large(source):
    with pytest.raises(ModelError, match=r"work|wide|lists|too large|which no template needs"):
        ChatTemplate(source, {}, Path("template"))


def test_a_template_that_only_sometimes_never_ends():
    source = "{% if messages | length > 1 %}{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}{% endif %}"  # fmt: skip # noqa: E501
    template = ChatTemplate(source, {}, Path("template"))
    with pytest.raises(RequestError, match="more work than a conversation needs"):
        template.render([{"role": "user", "content": "x"}] * 2)
    assert template.render([{"role": "user", "content": "x"}]) == ""  # and goes on after it
