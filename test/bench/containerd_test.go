package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestPrivateMemory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "smaps_rollup")
	text := "00400000-7fff r--p 00000000 00:00 0 [rollup]\nRss: 900 kB\nShared_Clean: 100 kB\n" +
		"Private_Clean: 12 kB\nPrivate_Dirty: 30 kB\nPrivate_Hugetlb: 0 kB\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}

	if n, err := privateMemory(file); err != nil || n != 42<<10 {
		t.Errorf("%d bytes, %v", n, err)
	}
}
