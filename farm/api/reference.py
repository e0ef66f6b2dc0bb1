"""/docs: the API's reference as a page that tries it out. Its script comes from here, not from somewhere else."""

from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

PATH = "/docs"
OWN = f"{PATH}/files"


def install(app: FastAPI) -> None:
    """Serve the page and what it is made of. The app is created with docs_url=None."""
    openapi_url = app.openapi_url or "/openapi.json"

    @app.get(PATH, include_in_schema=False)
    async def reference() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url=openapi_url,
            title=f"{app.title}: reference",
            swagger_js_url=f"{OWN}/swagger-ui-bundle.js",
            swagger_css_url=f"{OWN}/swagger-ui.css",
            swagger_favicon_url=f"{OWN}/favicon.png",
        )

    app.mount(OWN, StaticFiles(directory=str(files("fastapi_offline") / "static")), name="reference")
