"""The trainers and launchers that people use; each module needs the package that it is named after."""
