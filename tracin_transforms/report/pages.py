"""Pages in one file each, without scripts, network or server, from the templates beside this."""

from pathlib import Path
from typing import Any

import jinja2


def render_page(template: str, **values: Any) -> str:
    """Returns a page's HTML. All text in it is escaped.

    Args:
        template: Name of a template that extends ``page.html``.
        values: What the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
