"""A web page on which optimizers of this package run side by side: ``python -m fused_adaptive.playground``.

It needs the packages of ``pip install 'fused_adaptive[playground]'``; nothing else imports it. ``problems`` and
``training`` compute, with the package's own optimizers; ``settings`` has the bounds of every input and the link that
encodes them; ``figures`` draws with Plotly; ``page`` puts it together with Gradio.
"""
