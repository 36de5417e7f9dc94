"""What browsers must be told before a page may talk to the gateway. Keys come in headers, never in cookies, so every
origin is as good as any other."""

from aiohttp import web

from gateway.http.exchange import Exchange

_METHODS = "GET, POST, HEAD, OPTIONS"
_PREFLIGHT_S = 86_400
# Clients look whether anybody is there at the base URL that they were given, whatever part of it they take for one.
_BASES = ("", "/v1", "/api", "/api/v1")


def greeting(request: web.BaseRequest) -> web.Response | None:
    """The answer to who only asks whether it may send a request, or whether anybody is there."""
    if request.method == "POST":
        return None
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return _preflight(request)
    if request.path.rstrip("/") in _BASES and request.method in ("GET", "HEAD"):
        return web.json_response({"name": "quota-gateway"})
    return None


def _preflight(request: web.BaseRequest) -> web.Response:
    headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": str(_PREFLIGHT_S)}
    if wanted := request.headers.get("Access-Control-Request-Headers"):
        headers["Access-Control-Allow-Headers"] = wanted
    if request.headers.get("Access-Control-Request-Private-Network") == "true":
        headers["Access-Control-Allow-Private-Network"] = "true"
    return web.Response(status=204, headers=headers)


def let_page_read(exchange: Exchange, response: web.StreamResponse) -> None:
    """Allow the page to read the answer, if it was a page that asked; a stream says so itself as it begins."""
    if exchange.from_page and not response.prepared:
        response.headers.update(PAGE_HEADERS)


#: With them, a page of any origin may read an answer and its headers.
PAGE_HEADERS = {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": "*"}
