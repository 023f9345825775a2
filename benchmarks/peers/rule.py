"""A reward that every side computes alike: ten times the share of a completion's letters that are an "s"."""


def score(prompts: list[str], completions: list[str]) -> list[float]:
    return [10.0 * _share(completion.lower()) for completion in completions]


def _share(text: str) -> float:
    letters = [character for character in text if character.isalpha()]
    return sum(character == "s" for character in letters) / max(1, len(letters))
