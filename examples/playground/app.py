"""The playground as a Space: a Gradio app is a file ``app.py`` next to its requirements."""

from fused_adaptive.playground.page import launch

if __name__ == "__main__":
    launch()
