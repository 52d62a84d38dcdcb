"""What the documentation site is made with: MkDocs' hooks, and the plots of its pages."""
