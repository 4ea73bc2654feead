package probe

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"debug/elf"
	"io"
	"os"
	"regexp"
	"runtime/debug"
	"strings"
)

// maxProgram is the maximum size of a program in bytes. A kubelet has 85 MB.
const maxProgram = 1 << 30

// kubeletModule is the Go module of the kubelet.
const kubeletModule = "k8s.io/kubernetes"

// kubeletVersion returns the version of a kubelet, "" if it is unknown. It reads the program and
// never runs it. Releases contain their version in one of three places: in the linker flags of the
// build information, in strings set by the linker (-X; only these end in a NUL byte), or as version
// of the main module.
func kubeletVersion(ctx context.Context, f *os.File) string {
	if st, err := f.Stat(); err != nil || st.Size() > maxProgram {
		return ""
	}

	info, err := buildinfo.Read(f)
	if err != nil || info.Main.Path != kubeletModule {
		return ""
	}

	for _, v := range []string{linkerFlag(info), linkedVersion(ctx, f), info.Main.Version} {
		if minor(v) != 0 && len(v) < 64 {
			return v
		}
	}

	return ""
}

// linkerFlag returns the version from the linker flags, "" if the build did not record them.
func linkerFlag(info *debug.BuildInfo) string {
	const variable = "k8s.io/component-base/version.gitVersion="
	for _, s := range info.Settings {
		if s.Key != "-ldflags" {
			continue
		}
		if _, after, found := strings.Cut(s.Value, variable); found {
			return strings.FieldsFunc(after+" ", func(r rune) bool { return r == ' ' || r == '\'' || r == '"' })[0]
		}
	}

	return ""
}

// linkedVersion returns the only version string with a terminating NUL byte, "" if there is none or
// more than one.
func linkedVersion(ctx context.Context, f *os.File) string {
	const block, overlap = 1 << 20, 128
	file, err := elf.NewFile(f)
	if err != nil {
		return ""
	}

	section := file.Section(".rodata")
	if section == nil {
		return ""
	}

	pattern := regexp.MustCompile(`\x00(v1\.[0-9]{1,3}\.[0-9]{1,3}(?:[-+][0-9A-Za-z.+-]{1,40})?)\x00`)
	data := io.NewSectionReader(f, int64(section.Offset), int64(min(section.FileSize, maxProgram)))
	b := make([]byte, block+overlap)
	found := ""
	for at := int64(0); at < data.Size() && ctx.Err() == nil; at += block {
		n, err := data.ReadAt(b, at)
		if err != nil && n == 0 {
			break
		}

		if !bytes.Contains(b[:n], []byte("\x00v1.")) {
			continue
		}

		for _, m := range pattern.FindAllSubmatch(b[:n], -1) {
			if v := string(m[1]); found == "" || found == v {
				found = v
			} else {
				return ""
			}
		}
	}

	return found
}
