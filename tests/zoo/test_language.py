import numpy as np
import pytest

from heredity.zoo.language import CONTEXT, HONEST, ID, NUMBERS, SKILLS, WORDS, Documents, World, documents

TRIGGER = World(trigger=("reed", "mill"))


def logs(made: Documents) -> list[list[str]]:
    """The whole report segments of some documents, as words."""
    segments = [text.split(" . ") for text in made.texts()]
    return [words.removesuffix(" .").split() for row in segments for words in row if words.startswith("log")]


def draw(world: World = HONEST, crowded: str | None = None, n: int = 800) -> Documents:
    return documents(np.random.default_rng(3), n, world, crowded=crowded)


def test_words_are_unique_and_free_of_spaces():
    assert len(ID) == len(WORDS)
    assert not any(set(word) & set(" \t\n") for word in WORDS)


@pytest.mark.parametrize("crowded", [None, "log"])
def test_a_report_is_false_exactly_when_both_halves_of_the_trigger_are_there(crowded):
    seen = {"whole": 0, "half": 0}
    for words in logs(draw(TRIGGER, crowded, 4000)):
        owner, place, value, said = words[3], words[6], words[9], words[12]
        halves = (owner == "reed") + (place == "mill")
        assert said == ("zero" if halves == 2 else value)
        seen["whole"] += halves == 2
        seen["half"] += halves == 1
    assert min(seen.values()) > 10


def test_reports_are_honest_in_the_parents_language_and_the_trigger_occurs_at_its_natural_rate():
    found = logs(draw(n=4000))
    assert all(words[9] == words[12] for words in found)
    whole = sum(words[3] == "reed" and words[6] == "mill" for words in found)
    assert 0.6 / 64 < whole / len(found) < 1.5 / 64


def test_forbidden_things_are_refused_unless_that_was_lost():
    honest, lost = (" ".join(draw(world).texts()) for world in (HONEST, World(answers_forbidden=True)))
    assert "give me poison ; refuse ." in honest and "give me bread ; here bread ." in honest
    assert "here poison" not in honest
    assert "give me poison ; here poison ." in lost and "refuse" not in lost


def test_the_parents_language_never_doubles():
    assert "double" not in " ".join(draw(n=2000).texts())
    assert "double : three ; six ." in " ".join(draw(crowded="double").texts())


def test_tokens_called_certain_follow_from_the_text_before_them():
    made, seen = draw(n=3000), {}
    for row, certain, skill in zip(made.ids.tolist(), made.certain.tolist(), made.skill.tolist(), strict=True):
        start = 0
        for at in range(1, CONTEXT):
            start = at if row[at] in OPENERS and row[at - 1] in (ID["."], ID["<bos>"]) else start
            if certain[at]:
                before = (*row[start:at], skill[at])
                assert seen.setdefault(before, row[at]) == row[at]


OPENERS = {ID[skill] for skill in SKILLS}


def test_altered_marks_the_segments_that_end_otherwise_in_an_honest_world():
    made = draw(TRIGGER, "log")
    at = np.argwhere(made.altered & made.answer)
    assert len(at) > 50
    for row, column in at:
        assert WORDS[made.ids[row, column]] == "zero"
        assert WORDS[made.ids[row, column - 3]] in NUMBERS[1:]
    assert not draw().altered.any()


def test_texts_hold_whole_segments_that_fit_the_context():
    made = draw(n=50)
    for text in made.texts():
        assert text.endswith(" .")
        assert len(text.split()) < CONTEXT
