"""What is worth a look in texts, and the cheap look that decides which rows are looked at."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunewright.datasets.checking import quick_look
from tunewright.datasets.report import Problem, Reporter, Row
from tunewright.datasets.rules import hints, personal_data

CARD = "6222021234567894"
RESIDENT = "11010519491231002X"


def seen(text: str, *, escaped: bool = False) -> list[Problem]:
    value = {"messages": [{"role": "user", "content": text}]}
    data = json.dumps(value, ensure_ascii=escaped).encode()
    reporter = Reporter()
    hints.look(Row(reporter, 1, 0), data, value)
    return reporter.report(None, 1, 0).problems


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to li.wei88@qq.com today", personal_data.EMAIL),
        ("邮箱：zhang_san@mail.tsinghua.edu.cn。", personal_data.EMAIL),
        ("write to jane@example.com", None),
        ("write to jane@example.co.uk or b@shop.example", None),
        ("write to support@zhipuai.cn", None),
        ("git@github.com:a/b.git and icon@2x.png and foo@1.2.3", None),
        ("电话13812345678，谢谢", personal_data.MOBILE),
        ("+86 138-1234-5679", personal_data.MOBILE),
        ("8613812345679", personal_data.MOBILE),
        ("at 1381234567890", None),
        ("id_13812345678 and 0.13812345678", None),
        ("about 15000000000 stars, 13888888888", None),
        ("12012345678", None),
        (f"身份证号{RESIDENT}", personal_data.RESIDENT_ID),
        ("身份证号110105194912310021", None),
        ("card 4111 1111 1111 1111", personal_data.BANK_CARD),
        (f"卡号{CARD}", personal_data.BANK_CARD),
        ("卡号6222021234567895", None),
        ("1234 5678 9012 3456", None),
        ("9" * 18, None),
    ],
)
def test_personal_data_is_named_and_never_repeated(text: str, kind: str | None) -> None:
    assert personal_data.kind_in(text) == kind
    problems = seen(text)
    assert [p.code for p in problems] == (["possible_personal_data"] if kind else [])
    for problem in problems:
        assert problem.pointer == "/messages/0/content" and problem.severity == "warning"
        said = problem.text("en") + problem.text("zh") + str(problem.values)
        assert not any(part in said for part in ("qq", "tsinghua", "1381", "1949", "4111", "6222"))
        assert problem.text("en") != problem.text("zh")


PLAIN = [
    "“你好”……——他说：「今天天气真好」，然后走了。价格是￥128.50，电话010-62345678。" * 3,
    "It’s a “plain” text – with dashes … and café, 50 °C, a·b, $1,234,567.89 on 2024-01-02 03:04:05.",
    'task-oriented, risk-free, xoxo, snake_case_names, a_github_link <b>bold</b> if a < b: x = y[0] | z; "q" \\ n',
    "\\begin{align} \\frac{a}{b} \\beta \\text{x} \n\t\r",
    "Email jane@example.com, bob@company.com or support@zhipuai.cn; icon@2x.png",
    "🙂 👩\u200d👩\u200d👧 ﷼ Ελληνικά Tiếng Việt İstanbul",
]


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_passes_the_cheap_look(text: str) -> None:
    line = json.dumps({"content": text}, ensure_ascii=False).encode()
    assert not quick_look.may_need_look(line)
    assert not quick_look.may_need_look((line + b"\n") * (200_000 // len(line)))


ODD = [
    *("<|im_start|>", "<｜end▁of▁sentence｜>", "[gMASK]", "[/INST]", "<<SYS>>", "</s>", "<end_of_turn>"),
    *("a\u200bb", "\u202e", "\u2060", "\ufeff", "\x7f", "\x85", "\b", "\f", "\x01", "e" + "\u0301" * 9, "\u036f" * 9),
    *("sk-" + "a1" * 12, "AKIA" + "A" * 16, "ghp_" + "a" * 36, "github_pat_" + "a" * 22, "xoxb-1234567890"),
    *("AIza" + "b" * 35, "hf_" + "c" * 30, "0af9" * 8 + "." + "a1B2" * 4, "-----BEGIN RSA PRIVATE KEY-----"),
    *("a.person@gmail.com", "13812345678", "138 1234 5678", "8613812345678", CARD, RESIDENT, "6222 0212 3456 7894"),
    *(
        "4111-1111-1111-1111",
        "378282246310005",
        "\nest@gmail.com",
        "x@example.realname.org",
        "\tinfo@realname.com est@a.io",
    ),
]
_TEXT = st.lists(
    st.sampled_from(
        [
            *ODD,
            *'<>|[]-_@\\"/z K1230 .\n汉“’é',
            "sk-",
            "example.",
            "est@a.io",
            "@company.com",
            "x",
            "1381234",
            "0" * 15,
            "\U0001f600",
        ]
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("escaped", [False, True])
def test_odd_things_are_found_alone_and_anywhere_in_a_block(odd: str, escaped: bool) -> None:
    assert seen(odd), "found by the patterns"
    for text in (odd, f"汉{odd}字", f"\n{odd}\n", f" {odd} "):
        if seen_texts(text):
            line = json.dumps({"content": text}, ensure_ascii=escaped).encode()
            assert quick_look.may_need_look(line)
            plain = b'{"content": "plain text"}\n'
            for before in (0, 4000, 10_480, 10_485, 12_000):
                assert quick_look.may_need_look(plain * before + line + b"\n" + plain * 2000)


def seen_texts(text: str) -> bool:
    patterns = (hints._SPECIAL, hints._INVISIBLE, hints._SECRET)
    return any(pattern.search(text) for pattern in patterns) or personal_data.kind_in(text) is not None


@settings(max_examples=400)
@given(_TEXT | st.text(max_size=40), st.booleans(), st.integers(0, 80))
def test_the_cheap_look_never_misses(text: str, escaped: bool, shift: int) -> None:
    if seen_texts(text):
        line = json.dumps({"content": text}, ensure_ascii=escaped).encode("utf-8", "replace")
        assert quick_look.may_need_look(line)
        filler = b"{" + b"x" * shift + b"}\n"
        block = filler * 3 + line + b"\n" + filler + line
        ends = [block.count(b"\n", 0, place) for place in quick_look.suspects(block)]
        assert ends == [3, 5]


@settings(max_examples=200)
@given(st.lists(_TEXT, max_size=5))
def test_a_block_is_looked_at_if_one_of_its_lines_is(texts: list[str]) -> None:
    lines = [json.dumps({"content": text}, ensure_ascii=False).encode() for text in texts]
    block = b"\n".join([*lines, b"y" * 40_000])
    if any(quick_look.may_need_look(line) for line in lines):
        assert quick_look.may_need_look(block)
