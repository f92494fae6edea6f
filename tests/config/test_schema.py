"""`--help`: every key with its help, in aligned tables."""

from r3rag_jax.config.schema import help_text, schema


def test_every_key_has_help_and_stands_in_the_help_text() -> None:
    lines = help_text().splitlines()
    for name, field in schema().items():
        assert field.help and "\n" not in field.help
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.endswith(field.help)
    (line,) = [line for line in lines if line.startswith("  rl.critic.value_clip ")]
    assert line.split(maxsplit=5)[:5] == ["rl.critic.value_clip", "float", ">0", "-", "0.2"]
    assert "rl: Policy optimization against the live retriever." in lines
    assert "judge.endpoint: The server of `judge.kind: server`." in lines


def test_columns_of_a_section_are_aligned() -> None:
    for block in help_text().split("\n\n"):
        _, header, *rows = block.splitlines()
        for column in ("type", "bounds", "unit", "default"):
            at = header.index(column)
            assert all(row[at - 1] == " " and row[at] != " " for row in rows)
