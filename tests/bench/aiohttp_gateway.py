"""The usual alternative to a gateway with a journal: aiohttp and nats-py, one process, as one writes it in an afternoon.

Checks the raw signature and answers 202 when JetStream has acknowledged the message: what is not acknowledged is not
accepted, and while NATS is away nothing is. Usage: aiohttp_gateway.py PORT NATS_URL, the secret in SENTRY_CLIENT_SECRET.
"""

import hashlib
import hmac
import os
import sys

import nats
from aiohttp import web

SECRET = os.environ["SENTRY_CLIENT_SECRET"].encode()


async def receive(request):
    body = await request.read()
    expected = hmac.new(SECRET, body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected, request.headers.get("Sentry-Hook-Signature", "")):
        return web.json_response({"error": "the signature is not right"}, status=401)
    request_id = request.headers["Request-ID"]
    headers = {"Nats-Msg-Id": request_id}
    await request.app["jetstream"].publish("signals.sentry.error", body, timeout=30, headers=headers)
    return web.json_response({"data": {"deliveryId": request_id, "status": "accepted"}}, status=202)


async def connect(app):
    client = await nats.connect(sys.argv[2])
    app["jetstream"] = client.jetstream()
    await app["jetstream"].add_stream(name="SIGNALS", subjects=["signals.sentry.*"])
    yield
    await client.close()


app = web.Application(client_max_size=8 << 20)
app.cleanup_ctx.append(connect)
app.router.add_post("/api/signals/sentry", receive)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)
