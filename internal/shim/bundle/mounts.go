package bundle

import (
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
)

// makeRecursive makes read-only mounts recursively read-only (OCI runtime specification, option
// rro).
func makeRecursive(all []object, paths []string) error {
	for _, want := range paths {
		if err := editOptions(all, want, func(options *[]string) error {
			i := slices.Index(*options, "ro")
			if i < 0 {
				return fmt.Errorf("mount %s is not read-only", want)
			}
			(*options)[i] = "rro"
			return nil
		}); err != nil {
			return err
		}
	}

	return nil
}

// addOptions adds options to mounts.
func addOptions(all []object, options map[string][]string) error {
	for _, want := range slices.Sorted(maps.Keys(options)) {
		if err := editOptions(all, want, func(o *[]string) error {
			*o = append(*o, options[want]...)
			return nil
		}); err != nil {
			return err
		}
	}

	return nil
}

// editOptions changes the options of the mounts at a path. There must be one.
func editOptions(all []object, want string, change func(*[]string) error) error {
	found := false
	for _, m := range all {
		var target string
		if err := json.Unmarshal(m["destination"], &target); err != nil || path.Clean(target) != want {
			continue
		}

		found = true
		if err := edit(m, "options", change); err != nil {
			return err
		}
	}

	if !found {
		return fmt.Errorf("mount %s is missing", want)
	}

	return nil
}
