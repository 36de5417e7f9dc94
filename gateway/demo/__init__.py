"""The demo model: an upstream that answers every endpoint offline, so that the first command needs no key.

It is no model and says so in every text it gives. The same request always gets the same words, the same picture, the
same sound. What it cannot do (look at images, listen, sample) it either refuses or ignores; it never pretends. Every
model answers every endpoint, and no key is asked for.
"""
