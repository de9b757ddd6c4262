"""Text of a user's: its encoding, and a key that stands twice, which would be used once."""

from __future__ import annotations

from pathlib import Path

import pytest

from scoreact.support.errors import SettingError
from scoreact.support.text import parsed_json, parsed_yaml, read_text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfa\r\nb\rc", "a\nb\nc"),
        ("a\u2028b\u0085c\x0c\x0bd\n".encode(), "a\u2028b\u0085c\x0c\x0bd\n"),  # ends of lines elsewhere, not here
    ],
)
def test_lines_end_where_a_line_ends(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "a").write_bytes(content)
    assert read_text(tmp_path / "a") == text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a\ndog\u2019s".encode("cp1252"), "a.txt, line 2 is not UTF-8"),
        ("ab".encode("utf-16"), "a.txt, line 1 is not UTF-8"),
        (b"a\n\nb\0", "a.txt, line 3 holds a NUL"),
    ],
)
def test_what_is_no_utf8_is_refused_with_file_and_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(SettingError, match=said):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3"),
        ("rule:\n  x: 1\n  x: 1\n", "the key 'x' stands there twice"),
        ("{a: 1, a: 1}", "the key 'a' stands there twice"),
        ("a: [1", "cannot be read as YAML"),
        ("a: 2024-13-01", "cannot be read as YAML"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_with_a_key_twice_and_other_faults(text: str, said: str) -> None:
    with pytest.raises(SettingError, match=rf"a\.yaml .*{said}"):
        parsed_yaml(text, "a.yaml")
    assert parsed_yaml("base: &b {x: 1}\nmine: {<<: *b, x: 2}", "a.yaml")["mine"] == {"x": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' stands there twice"),
        ('{"a": }', r"is no JSON \(Expecting value at column 7\)"),
        ("[" * 200_000, "nested too deeply"),
        (f'{{"a": {"9" * 5000}}}', "cannot be read as JSON"),
    ],
)
def test_json_with_a_key_twice_and_other_faults(text: str, said: str) -> None:
    with pytest.raises(SettingError, match=rf"a\.json .*{said}"):
        parsed_json(text, "a.json")
