"""How far rows are from those wanted."""


def relative_error(found, wanted) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def largest_error(found, wanted) -> float:
    """Of any value, in units of the root mean square of what is wanted."""
    return ((found - wanted).abs().max() / wanted.square().mean().sqrt()).item()
