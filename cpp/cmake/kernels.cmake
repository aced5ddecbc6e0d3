# The kernels: one fat binary per BUILD of launches.def, and a source that embeds them all.

if(DEFINED ENV{ALIKED_NVCC})
  set(ALIKED_NVCC $ENV{ALIKED_NVCC} CACHE FILEPATH "NVIDIA's compiler, 12.8 or newer")
endif()
find_program(ALIKED_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
             PATHS /usr/local/cuda DOC "NVIDIA's compiler, 12.8 or newer")
if(NOT ALIKED_NVCC)
  message(FATAL_ERROR "There is no nvcc: install the CUDA toolkit, or the wheels of "
                      "cuda-toolkit[nvcc,cccl], and pass -DALIKED_NVCC=.../bin/nvcc (docs/cpp.md)")
endif()
# cuda.h: nvcc knows where its headers are, also where it is a link or a script.
execute_process(COMMAND ${ALIKED_NVCC} --dryrun -x cu -E /dev/null
                ERROR_VARIABLE dryrun OUTPUT_QUIET RESULT_VARIABLE ignored)
string(REGEX MATCH "INCLUDES=\"-I([^\"]+)\"" found "${dryrun}")
find_path(ALIKED_CUDA_INCLUDE cuda.h HINTS "${CMAKE_MATCH_1}" ENV CUDA_HOME ENV CUDA_PATH
          PATHS /usr/local/cuda PATH_SUFFIXES include DOC "Folder of cuda.h" REQUIRED)

foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
  if(NOT architecture MATCHES "^[0-9]+$")
    message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES has ${architecture}; give numbers such as 80;90")
  endif()
endforeach()
set(ALIKED_COMPILE ${CMAKE_CURRENT_LIST_DIR}/compile.cmake)

# What the table compiles: `aliked_builds`, a list of "source;-DNAME=VALUE;..." with | for ;.
function(aliked_read_builds file)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
  file(READ ${file} table)
  string(REGEX REPLACE "//[^\n]*" "" table "${table}")
  string(REGEX REPLACE "[ \n]+" "" table "${table}")
  string(REGEX MATCHALL "(FIELDS|BUILD)\\([^)]*\\)" rows "${table}")
  set(builds "")
  foreach(row IN LISTS rows)
    string(REGEX MATCH "^(FIELDS|BUILD)\\(([a-z_0-9]+),(.*)\\)$" found "${row}")
    set(source ${CMAKE_MATCH_2})
    string(REPLACE "," ";" cells "${CMAKE_MATCH_3}")
    if(CMAKE_MATCH_1 STREQUAL "FIELDS")
      set(fields_${source} ${cells})
    else()
      set(build ${source})
      foreach(name value IN ZIP_LISTS fields_${source} cells)
        string(APPEND build "|-D${name}=${value}")
      endforeach()
      list(APPEND builds "${build}")
    endif()
  endforeach()
  set(aliked_builds ${builds} PARENT_SCOPE)
endfunction()

# The architectures that a build is for: clusters from 90 on, and what stands in for them below.
function(aliked_architectures_of build result)
  set(chosen "")
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    if(build MATCHES "KIND=2" AND architecture LESS 90)
      continue()
    endif()
    if(build MATCHES "KIND=1" AND build MATCHES "POOL=[01]" AND architecture GREATER_EQUAL 90)
      continue()
    endif()
    list(APPEND chosen ${architecture})
  endforeach()
  set(${result} ${chosen} PARENT_SCOPE)
endfunction()

# Sets <name>_SOURCES: what to compile into the library, <name>_REPORTS: what ptxas says of each,
# and aliked_builds.
function(aliked_embed_kernels name)
  aliked_read_builds(${ALIKED_KERNELS}/launches.def)
  # PTX for GPUs that are newer than all: of 90, so that it has clusters, or else of the newest.
  set(ptx 0)
  set(clusters false)
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    if(architecture GREATER_EQUAL 90)
      set(clusters true)
    endif()
    if((architecture GREATER ptx AND ptx LESS 90) OR architecture EQUAL 90)
      set(ptx ${architecture})
    endif()
  endforeach()
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/kernels)
  file(MAKE_DIRECTORY ${folder})
  set(assembly ".section .rodata\n")
  set(declarations "")
  set(addresses "")
  set(number 0)
  foreach(build IN LISTS aliked_builds)
    string(REPLACE "|" ";" parts "${build}")
    list(POP_FRONT parts source)
    aliked_architectures_of("${build}" architectures)
    set(symbol aliked_kernels_${number})
    if(architectures)
      set(targets "")
      foreach(architecture IN LISTS architectures)
        list(APPEND targets -gencode arch=compute_${architecture},code=sm_${architecture})
        if(architecture EQUAL ptx)
          list(APPEND targets -gencode arch=compute_${ptx},code=compute_${ptx})
        endif()
      endforeach()
      set(binary ${folder}/${number}_${source}.fatbin)
      add_custom_command(OUTPUT ${binary} ${binary}.txt
        COMMAND ${CMAKE_COMMAND} -DREPORT=${binary}.txt -P ${ALIKED_COMPILE} --
                ${ALIKED_NVCC} -std=c++17 -fatbin ${targets} ${parts}
                -include ${ALIKED_KERNELS}/warp.cuh -Xptxas -v -Wno-deprecated-gpu-targets
                ${ALIKED_KERNELS}/${source}.cu -o ${binary}
        DEPENDS ${ALIKED_KERNELS}/${source}.cu ${ALIKED_KERNELS}/warp.cuh ${ALIKED_COMPILE}
        COMMENT "Compiling ${source}.cu, build ${number}" VERBATIM)
      list(APPEND binaries ${binary})
      list(APPEND reports ${binary}.txt)
      string(APPEND assembly ".balign 64\n.globl ${symbol}\n.hidden ${symbol}\n"
                             "${symbol}:\n.incbin \"${binary}\"\n")
      string(APPEND declarations "extern \"C\" const char ${symbol}[];\n")
      string(APPEND addresses "    ${symbol},\n")
    else()
      string(APPEND addresses "    nullptr,\n")
    endif()
    math(EXPR number "${number} + 1")
  endforeach()
  string(APPEND assembly ".section .note.GNU-stack,\"\",@progbits\n")
  file(CONFIGURE OUTPUT ${folder}/kernels.S CONTENT "${assembly}" @ONLY)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
  file(CONFIGURE OUTPUT ${folder}/embedded.cpp @ONLY CONTENT "#include \"embedded.h\"
${declarations}
namespace aliked::core {
namespace {
const char *const IMAGES[] = {
${addresses}};
}
const void *embedded_image(int build) { return IMAGES[build]; }
const char *const EMBEDDED_ARCHITECTURES = \"${architectures}\";
const bool EMBEDDED_CLUSTERS = ${clusters};
}
")
  set_source_files_properties(${folder}/kernels.S PROPERTIES OBJECT_DEPENDS "${binaries}")
  set(${name}_SOURCES ${folder}/kernels.S ${folder}/embedded.cpp PARENT_SCOPE)
  set(${name}_REPORTS ${reports} PARENT_SCOPE)
  set(aliked_builds ${aliked_builds} PARENT_SCOPE)
endfunction()
