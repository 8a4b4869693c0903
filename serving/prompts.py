"""What the load generator asks when it is not told: short questions that any instruct model answers."""

PROMPTS = (
    "What does the assert statement do in Python?",
    "Explain the difference between a list and a tuple.",
    "How does a for loop work?",
    "What is a class?",
    "When is the finally block of a try statement run?",
    "What does the with statement do?",
    "Describe what a dictionary is good for.",
    "What is the meaning of the global statement?",
)
