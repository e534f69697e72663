"""The categories of prompts, and the question by which a prompt's category is asked for.

Tasks and dispatch share this: what the classification expert is trained on is what it is asked later.
"""

# As the first pass describes them to the model, by label.
CATEGORIES = {
    "math": "calculating with numbers: arithmetic, equations and word problems",
    "code": "writing Python: a function, a program, code that does what is described",
    "reasoning": "thinking through what is given: comparing, ordering, what comes next, what does not belong",
}
# What belongs to none of them, and is answered by the base model.
OTHER = "other"
OTHER_DESCRIPTION = "anything else: chatting, facts, opinions, writing"
# What the classification expert can answer.
LABELS = (*CATEGORIES, OTHER)
# The name and the label of the classification expert itself, which stands for no category.
CLASSIFIER = "classifier"


def question(prompt: str) -> str:
    """What the classification expert is asked about a user's prompt, in a chat; its answer is one of LABELS."""
    *before, last = LABELS
    return f"Name the category of this text: {', '.join(before)} or {last}.\n\nText: {prompt}\n\nCategory:"
