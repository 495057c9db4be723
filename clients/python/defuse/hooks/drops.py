"""Why something is not reported."""


class Dropped(Exception):
    """Something is dropped: the reason by which it is counted, and the sentence that is logged.

    `about` is the id of the one observation of a batch that is at fault, where that is known. It is no error of the
    caller's, and never reaches him.
    """

    def __init__(self, reason: str, message: str, *, about: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.about = about
