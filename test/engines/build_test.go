package engines

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// TestTags expects the build tags of the packages: tests of another program would prove little.
func TestTags(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}

	if !slices.Contains(strings.Split(string(makefile), "\n"), "TAGS = "+tags) {
		t.Errorf("the Makefile builds the packages with other tags than %q", tags)
	}
}
