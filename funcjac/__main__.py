"""``python -m funcjac`` runs the demonstration."""

from funcjac._demo.demonstration import main

if __name__ == "__main__":
    main()
