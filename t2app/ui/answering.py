"""JavaScript by which the page has a prompt answered on other occasions than a click on "Answer".

Whoever lets go of a slider or chooses an example wants another answer than the one that is being written, so that one
is stopped first. Gradio begins no second answer until the page has seen the end of the first, which the page alone
knows.
"""

# Before an answer is asked for: what it is asked with, unchanged.
BEGIN = "(...inputs) => { window.answering = true; return inputs; }"

# Once it has ended.
END = """() => {
  window.answering = false;
  if (window.answerAgain) window.pressAnswer();
}"""

# Where somebody stops it: the status until it has ended, in place of the present one.
STOP = '(status) => (window.answering ? "Stopping…" : status)'

# On such an occasion. What it changed, a slider's weight, takes the page a moment (100 ms) to know itself.
ANSWER = """(prompt) => {
  if (!prompt.trim()) return;
  const [answer, stop] = ["#answer", "#stop"].map((button) => document.querySelector(button));
  window.answerAgain = true;
  window.pressAnswer = () => {
    if (!window.answerAgain || window.answering) return;
    if (answer.disabled) return setTimeout(window.pressAnswer, 50);
    window.answerAgain = false;
    answer.click();
  };
  const pressStop = () => {
    if (!window.answerAgain || !window.answering) return;
    if (stop.disabled) return setTimeout(pressStop, 50);
    stop.click();
  };
  setTimeout(window.answering ? pressStop : window.pressAnswer, 100);
}"""
