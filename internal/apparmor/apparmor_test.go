package apparmor

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// kernelWith returns a kernel with this list of profiles.
func kernelWith(t *testing.T, list string) Kernel {
	t.Helper()
	k := Kernel{root: t.TempDir()}
	file := filepath.Join(k.root, profilesFile)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(list), 0o444); err != nil {
		t.Fatal(err)
	}

	return k
}

func TestIsLoaded(t *testing.T) {
	k := kernelWith(t, "docker-default (enforce)\n"+
		"/usr/bin/man (enforce)\n"+
		"my profile (old) (complain)\n"+
		":lxd-web_<var-snap>:// (enforce)\n"+
		":ns://inner (enforce)\n"+
		"web//nginx (unconfined)\n"+
		"last (kill)")

	tests := map[string]bool{
		"docker-default":     true,
		"/usr/bin/man":       true,
		"my profile (old)":   true,
		"web//nginx":         true,
		":ns://inner":        true,
		"last":               true,
		"":                   false,
		"docker":             false,
		"docker-default ":    false,
		"default":            false,
		"my profile":         false,
		"inner":              false,
		"web":                false,
		"unconfined":         false,
		"docker-default\nxx": false,
	}

	for name, want := range tests {
		t.Run(name, func(t *testing.T) {
			if got, err := k.IsLoaded(name); err != nil || got != want {
				t.Errorf("IsLoaded(%q) = %v, %v, want %v", name, got, err, want)
			}
		})
	}
}

// TestUnreadable checks that a list that is missing or not read to its end is an error: the caller
// must not take a profile for missing.
func TestUnreadable(t *testing.T) {
	if _, err := (Kernel{root: t.TempDir()}).IsLoaded("own"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without securityfs: %v", err)
	}

	long := kernelWith(t, strings.Repeat("x", maxLine+1)+" (enforce)\nown (enforce)\n")
	if loaded, err := long.IsLoaded("own"); err == nil {
		t.Errorf("with a line beyond the limit: %v without an error", loaded)
	}

	big := kernelWith(t, strings.Repeat(strings.Repeat("x", 1000)+" (enforce)\n", maxList/1000)+"own (enforce)\n")
	if loaded, err := big.IsLoaded("own"); err == nil {
		t.Errorf("with a list beyond the limit: %v without an error", loaded)
	}
}

func TestEmptyList(t *testing.T) {
	if loaded, err := kernelWith(t, "").IsLoaded("own"); loaded || err != nil {
		t.Errorf("IsLoaded with an empty list: %v, %v", loaded, err)
	}
}
