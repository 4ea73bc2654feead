// Package apparmor reads the names of the AppArmor profiles in the kernel.
package apparmor

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// profilesFile lists the loaded profiles, one per line: "docker-default (enforce)". The names of
// profiles in a child namespace begin with ":NAMESPACE://" (Linux, security/apparmor/apparmorfs.c).
const profilesFile = "sys/kernel/security/apparmor/profiles"

const (
	// maxList bounds the list of profiles, in bytes. A desktop with snaps has 20 KiB.
	maxList = 16 << 20
	// maxLine bounds a line of the list, in bytes. The API server allows 4,095 bytes for a name.
	maxLine = 64 << 10
)

// Kernel is the running kernel, or a copy of its files below another root.
type Kernel struct{ root string }

// Host returns the running kernel.
func Host() Kernel { return Kernel{root: "/"} }

// IsLoaded reports whether a profile of this name is loaded. It fails if the list cannot be read
// completely, for example because securityfs is not mounted or belongs to the host of this machine.
func (k Kernel) IsLoaded(profile string) (bool, error) {
	f, err := os.Open(filepath.Join(k.root, profilesFile))
	if err != nil {
		return false, fmt.Errorf("list AppArmor profiles: %w", err)
	}
	defer f.Close()

	isLoaded, err := contains(f, profile)
	if err != nil {
		return false, fmt.Errorf("list AppArmor profiles: %w", err)
	}

	return isLoaded, nil
}

// contains reports whether a list of profiles has a name.
func contains(list io.Reader, profile string) (bool, error) {
	limited := &io.LimitedReader{R: list, N: maxList}
	lines := bufio.NewScanner(limited)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		if name, isProfile := parse(lines.Text()); isProfile && name == profile {
			return true, nil
		}
	}

	if err := lines.Err(); err != nil {
		return false, err
	}
	if limited.N <= 0 {
		return false, fmt.Errorf("more than %d bytes", maxList)
	}

	return false, nil
}

// parse returns the name in a line of the list. Names may contain spaces and parentheses, modes may
// not.
func parse(line string) (name string, isProfile bool) {
	end := strings.LastIndex(line, " (")
	if end <= 0 || !strings.HasSuffix(line, ")") {
		return "", false
	}
	return line[:end], true
}
