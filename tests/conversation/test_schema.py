"""Schemas: the shipped ones load, wrong ones are refused with the slot's name."""

import pytest

from v2l_fast.conversation.schema import SHIPPED, Schema
from v2l_fast.errors import ConfigError


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.toml")))
def test_shipped_schemas_load(name):
    schema = Schema.load(name)
    assert schema.slots and all(slot.question.endswith("?") for slot in schema.slots.values())


def test_values_are_accepted_whatever_their_case():
    genre = Schema.load("movies").slots["genre"]
    assert genre.accept(" Science  Fiction ") == "science fiction"
    assert genre.accept("western") is None
    assert Schema.load("viewer").slots["focus"].accept("the  ring") == "the ring"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "slots must be a table"),
        ("[slots.a]\nvalues = []", "question is missing"),
        ('[slots.a]\nquestion = "Which"', "question mark"),
        ('[slots.a]\nquestion = "Which?"\nweight = -1', "weight must be at least 0, got -1"),
        ('[slots.a]\nquestion = "Which?"\nsize = 1', "unknown field 'size'"),
        ('[slots.a]\nquestion = "Which?"\nvalues = [1]', "values must be strings"),
        ('[slots."a b"]\nquestion = "Which?"', "identifier"),
        ("slots = 1", "slots must be a table"),
        ("[", "Expected|Invalid|expected"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        Schema.load(path)
    assert "mine.toml" in str(error.value)


def test_unknown_names_list_the_shipped_ones():
    with pytest.raises(ConfigError, match="movies, shapes, support, viewer"):
        Schema.load("nothing")
