"""Why something is not reported."""


class Dropped(Exception):
    """Something is dropped: the reason by which it is counted, and the sentence that is logged.

    No error of the caller's, and it never reaches him.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
