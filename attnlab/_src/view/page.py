"""``show`` and ``show_weights``: pages of their own, with nothing to load."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

from attnlab._src import arguments
from attnlab._src.files import write_atomically
from attnlab._src.masks.base import Mask
from attnlab._src.types import ArrayLike, AttentionResult, Plan
from attnlab._src.view.masks import as_json, content_of, content_of_plan
from attnlab._src.view.weights import content_of_weights


@dataclasses.dataclass(frozen=True)
class Page:
    """An HTML page; as the last value of a notebook's cell it is shown there.

    Attributes:
        html: the whole page, with its data and its program.
    """

    html: str

    def save(self, path: str | Path) -> Path:
        """Writes the page to a file, which any browser opens; returns its path."""
        path = Path(path)
        write_atomically(path, self.html.encode())
        return path

    def _repr_html_(self) -> str:
        inner = html.escape(self.html)
        return (
            f'<iframe srcdoc="{inner}" style="width: 100%; height: 760px; border: 0" '
            'title="attnlab"></iframe>'
        )

    def __repr__(self) -> str:
        return f"Page({len(self.html):,} characters; save(path) writes it to a file)"


def show(
    thing: Mask | Plan | Sequence[Mask],
    query_length: int | None = None,
    key_length: int | None = None,
    *,
    block_size: int | None = None,
) -> Page:
    """Draws masks, or a plan, as a page that one can zoom into and point at.

    From afar it shows blocks: empty, full, or with both visible and hidden pairs; from
    near it shows pairs. It tells which part of a mask decides about a pair. Whatever
    the length, the page holds the plan and the rules of the mask, and no ``[T, S]``
    array; only a rule that a browser may round otherwise (``jnp.exp``, products of
    floats) is stored pair by pair, and not at all beyond 2^24 pairs.

    Args:
        thing: a mask, several masks, or the plan of one.
        query_length: T; of a plan it is known.
        key_length: S; T if not given.
        block_size: positions in a block of the picture; if not given, at least 64, and
            as many as keep the page small.

    Returns:
        A page. The last value of a notebook's cell is drawn there;
        ``page.save("mask.html")`` writes a file.

    Raises:
        ImportError: if jinja2 is not installed.
        TypeError: if ``thing`` is something else, or a mask comes without a length.
        ValueError: if arrays of a mask are traced, or it does not fit the lengths.

    Example:
        >>> from attnlab import masks, show
        >>> page = show(masks.causal() & masks.sliding_window(8, 0), 1024)
        >>> len(page.html) < 100_000
        True
    """
    if isinstance(thing, Plan):
        if (query_length, key_length, block_size) != (None, None, None):
            raise TypeError("query_length: a plan has lengths and blocks of its own")
        return page_of([content_of_plan(thing)])
    each = [thing] if isinstance(thing, Mask) else thing
    if not isinstance(each, (list, tuple)) or not all(
        isinstance(x, Mask) for x in each
    ):
        raise TypeError(
            "thing: expected a mask, a list of masks or a Plan, got "
            f"{type(thing).__name__}"
        )
    if not each:
        raise ValueError("thing: expected at least one mask, got an empty list")
    if query_length is None:
        raise TypeError("query_length: expected a length, as in show(mask, 1024)")
    t = arguments.size("query_length", query_length)
    s = t if key_length is None else arguments.size("key_length", key_length)
    if block_size is not None:
        block_size = arguments.size("block_size", block_size)
    return page_of([content_of(mask, t, s, block_size) for mask in each])


def show_weights(
    results: AttentionResult | ArrayLike | Mapping[str, AttentionResult | ArrayLike],
    tokens: Sequence[str] | None = None,
    key_tokens: Sequence[str] | None = None,
    *,
    example: int = 0,
) -> Page:
    """Draws attention weights, by layer and head, as a page to look through.

    It shows all layers and heads side by side, one of them as a picture to zoom into
    (source to the right, target down), and for the query under the pointer its
    greatest weights, as a table and as arcs over the text. The page holds the 64
    greatest weights of a query, or fewer where there are more than 2^20 in all; weights
    are rounded to 1/65,535 of the greatest one of a layer, or of 1.

    Args:
        results: what ``attention_with_stats(..., top_k=64)`` or a module's
            ``with_stats`` returns (``top_k="all"`` will do, too), or weights
            ``[B, N, T, S]``, or ``[B, T, S]`` as ``with_weights`` of recurrent models
            returns them; or several of these by name.
        tokens: T strings for the queries; numbers if not given.
        key_tokens: S strings for the keys; ``tokens`` if not given.
        example: which example of the batch is shown.

    Returns:
        A page; see :func:`show`.

    Raises:
        ImportError: if jinja2 is not installed.
        TypeError: if a result is something else, or tokens are no strings.
        ValueError: if a result has no weights, or numbers do not fit.

    Example:
        >>> import jax
        >>> from attnlab import attention_with_stats, show_weights
        >>> x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
        >>> result = attention_with_stats(x, x, x, top_k="all")
        >>> page = show_weights(result, "the cat sat down".split())
        >>> "cat" in page.html
        True
    """
    if isinstance(results, (AttentionResult, jax.Array, np.ndarray)):
        results = {"attention": results}
    if not isinstance(results, Mapping) or not results:
        raise TypeError(
            "results: expected an AttentionResult or weights, or several by name, got "
            f"{type(results).__name__}"
        )
    content = content_of_weights(results, tokens, key_tokens, example)
    names = [each["name"] for each in content["layers"]]
    title = f"Attention weights: {names[0]}" + (
        f" and {len(names) - 1} more" if len(names) > 1 else ""
    )
    return _picture("weights", title, content)


def page_of(contents: Sequence[dict[str, Any]]) -> Page:
    """The page of what ``content_of`` returns.

    Raises:
        ImportError: if jinja2 is not installed.
    """
    first = contents[0]
    size = f"{first['queries']:,} queries, {first['keys']:,} keys"
    title = size if len(contents) > 1 else f"{first['text']}: {size}"
    return _picture("mask", title, {"masks": contents})


def render(kind: str, title: str, *, scripts: Sequence[str], **values: Any) -> Page:
    """Fills the template of a kind of page; all text is escaped.

    Args:
        kind: name of a file in ``pages``, without its ending.
        title: of the page.
        scripts: files in ``pages``, which become one program.
        **values: what else the template names.

    Raises:
        ImportError: if jinja2 is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError:
        raise ImportError(
            "pages need jinja2, which comes with pip install attnlab[bench]"
        ) from None
    folder = resources.files("attnlab._src.view") / "pages"
    read = lambda name: (folder / name).read_text("utf-8")
    loader = jinja2.FunctionLoader(read)
    pages = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    text = pages.get_template(f"{kind}.html").render(
        title=title,
        style=Markup(read("style.css")),
        script=Markup("".join(map(read, scripts))),
        **values,
    )
    return Page(text)


def _picture(kind: str, title: str, content: dict[str, Any]) -> Page:
    """A page of a picture to zoom into."""
    scripts = "common.js", f"{kind}.js"
    return render(kind, title, scripts=scripts, content=as_json(content))
