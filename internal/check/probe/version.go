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

// maxProgram bounds the programs that are read, in bytes. A kubelet has 85 MB.
const maxProgram = 1 << 30

// kubeletModule is the Go module of the kubelet.
const kubeletModule = "k8s.io/kubernetes"

// kubeletVersion is the version of a kubelet, "" if it is not known. The program is read, never
// run. Releases carry their version in one of three places: among the linker's flags in the build
// information, as strings that the linker set (-X, which are the only ones that end in a NUL byte),
// or as the version of the main module.
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

// linkerFlag is the version that was given to the linker, "" if the build did not record it.
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

// linkedVersion is the one version string that ends in a NUL byte, "" if there is none or several.
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
