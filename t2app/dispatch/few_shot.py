"""Dispatch by a mixture that a search found (paper, section 3.2): the search was paid once, every prompt is free."""

from t2app.dispatch.dispatcher import Decision, Dispatcher
from t2app.found_mixtures import KeptMixture, MixtureError
from t2app.messages import few_shot
from t2app.models.model import Model
from t2app.parts import Parts


class FewShotDispatch(Dispatcher):
    """Always decides on the kept mixture, whatever the prompt.

    Raises:
        MixtureError: it was found on other weights or with other experts than the model's.
    """

    def __init__(self, model: Model, mixture: KeptMixture):
        if mixture.fingerprint != model.identity.fingerprint:
            raise MixtureError(
                f"mixture '{mixture.name}' was found on other weights ({mixture.model}, {mixture.fingerprint[:8]}…) "
                f"than this model's ({model.name}, {model.identity.fingerprint[:8]}…); search anew"
            )
        present = {expert.name: expert.fingerprint for expert in model.experts}
        for name, fingerprint in mixture.experts.items():
            if present.get(name) != fingerprint:
                found = "is not there" if name not in present else f"is another one now ({present[name][:8]}…)"
                raise MixtureError(
                    f"mixture '{mixture.name}' was found with the expert '{name}' ({fingerprint[:8]}…), which {found}; "
                    "bring that expert back or search anew"
                )
        self.name = few_shot(mixture.name)
        self._mixture = mixture
        self._weights = dict.fromkeys(present, 0.0) | dict(mixture.weights)

    def deciding(self, prompt: str) -> Parts[Decision]:
        yield from ()  # there is nothing to compute
        found = self._mixture
        of_task = "" if found.task == found.name else f" of {found.task}"
        shots = "1 example" if found.shots == 1 else f"{found.shots} examples"
        note = f"The mixture “{found.name}”, found on {shots}{of_task}."
        return Decision(label=None, weights=self._weights, note=note, trace=found.trace)
