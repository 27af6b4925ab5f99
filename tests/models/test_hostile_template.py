"""Chat templates with endless nesting or gigabytes in one operation are stopped."""

from pathlib import Path

import pytest

from llmrs.core.errors import ModelError, RequestError
from llmrs.models.text.template import ChatTemplate
from llmrs.models.text.template_files import MAX_TEMPLATE_CHARS

DEPTH = MAX_TEMPLATE_CHARS - 100
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
    "{{ 'x' | center(10**9) }}",
    "{{ 'x' | center(width=-10**9) }}",
    "{{ 'x'.ljust(10001) }}",
    "{{ 'x'.rjust(10**9) }}",
    "{{ 'x'.encode().center(10**9) }}",
    "{{ 'x'.encode().zfill(10**9) }}",
    "{{ ('\t' * 1000).encode().expandtabs(10**6) }}",
    "{{ (messages[0].content | attr('center'))(10**9) }}",
    "{{ 'x' | e | attr('zfill') }}{{ ('x' | e).zfill(10**9) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ [1] | batch(linecount=10**9, fill_with='x') | list }}",
    "{{ [1] | slice(10**9) | list }}",
    "{{ [1] | slice(slices=10**9) | list }}",
    "{{ ['x'] | map('indent', 10**9) | list }}",
    "{{ ['x'] | map('center', width=10**9) | list }}",
    "{{ ('x\n' * 50000) | indent(100) | length }}{{ ('x\n' * 500000) | indent(100) | length }}",
    "{{ 1 | round(-10**9) }}",
    "{{ 1 | round(precision=10**9, method='ceil') }}",
    "{{ (1).to_bytes(10**9, 'big') }}",
    "{{ (1).to_bytes(length=10**9) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '%*d' | format(1000000000, 1) }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}",
    "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
    "{{ '%%%1000000000d' % 1 }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '%1000000000d'.encode() % 1 }}",
    "{{ '{0:>1000000000}'.format('x') }}",
    "{{ '{:.1000000000f}'.format(1.5) }}",
    "{{ '{{}}{:{w}}'.format(1, w=1000000000) }}",
    "{{ strftime_now('%%%1000000000Y') }}",
    "{{ range(100000) | join('x' * 10000) | length }}",
    "{{ ('x' * 10000).join(range(100000) | map('string')) | length }}",
    "{{ {'a': 1}.fromkeys(range(100000)).items() | join('x' * 10000) | length }}",
    "{% set ns = namespace(x=[[]] * 1000) %}{% for i in range(60) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{% for i in range(40) %}{{ ns.x | tojson(indent=100) }}{% endfor %}",
    "{% set n = ('f' * 1000000) | int(base=16) %}{{ n // 3 }}",
    "{% set n = ['f' * 1000000] | map('int', base=16) | first %}{{ n // 3 }}",
    "{% set n = (1).from_bytes(('f' * 1000000).encode(), 'big') %}{{ n % 3 }}",
    "{{ (('<!---->' * 100000) | safe).striptags() }}",
    "{% set a = 'a' * 1000000 %}{{ a.rfind('ab' + a[:500000]) }}",
    "{% set x = 'a' * 2000000 %}" + "".join(f"{{% set a{n} = x[1:] %}}" for n in range(5000)),
]


@pytest.mark.parametrize("source", LARGE)
def test_no_single_operation_is_large(source):
    with pytest.raises(ModelError, match=r"work|wide|lists|too large|size over|which no template needs"):
        ChatTemplate(source, {}, Path("template"))


FINE = {  # nothing here is large
    "{{ '{:,} {{2024}} {{{}}}'.format(2100000, 0) }}": "2,100,000 {2024} {0}",
    "{{ '100%% of 2024: %05d %(x)s' | replace('%(x)s', '') % 7 }}": "100% of 2024: 00007 ",
    "{{ '%(a2024)s' % {'a2024': 1} }}": "1",
    "{{ 'x' | center(3) }}{{ 'x'.zfill(10000) | length }}": " x 10000",
    "{{ range(1000000, 1000003) | join(',') }}": "1000000,1000001,1000002",
    "{{ [1, 2, 3] | batch(2, 2100000) | list }}": "[[1, 2], [3, 2100000]]",
    "{{ 2100000 | round(2) }}{{ 1732752000.126 | round(2, 'floor') }}": "21000001732752000.12",
    "{{ '%s, %s' | format(2100000, 'x') }}": "2100000, x",
    "{{ strftime_now('%%2024 (2024)') }}": "%2024 (2024)",
}


@pytest.mark.parametrize("source", FINE)
def test_what_looks_large_but_is_not(source):
    assert ChatTemplate(source, {}, Path("template")).render([{"role": "user", "content": "x"}]) == FINE[source]


def test_a_template_that_only_sometimes_never_ends():
    source = "{% if messages | length > 1 %}{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}{% endif %}"  # fmt: skip # noqa: E501
    template = ChatTemplate(source, {}, Path("template"))
    with pytest.raises(RequestError, match="more work than a conversation needs"):
        template.render([{"role": "user", "content": "x"}] * 2)
    assert template.render([{"role": "user", "content": "x"}]) == ""  # and goes on after it
